module "network" {
  source = "../../modules/network"

  label  = var.label
  region = var.region
}

module "firewall" {
  source = "../../modules/firewall"

  label      = var.label
  node_cidrs = [module.network.cidr]
}

module "cluster" {
  source = "../../modules/cluster"

  label               = var.label
  region              = var.region
  k8s_version         = var.k8s_version
  vpc_id              = module.network.vpc_id
  subnet_id           = module.network.subnet_id
  firewall_id         = module.firewall.firewall_id
  administrator_cidrs = var.administrator_cidrs
  baseline            = var.baseline
  gpu_pools           = var.gpu_pools
}

module "database" {
  source = "../../modules/database"

  label     = var.label
  region    = var.region
  vpc_id    = module.network.vpc_id
  subnet_id = module.network.subnet_id
}

module "exports" {
  source = "../../modules/storage"

  label  = "${var.label}-exports"
  region = var.region
}

module "telemetry" {
  source = "../../modules/storage"

  label  = "${var.label}-telemetry"
  region = var.region
}

module "dns" {
  source = "../../modules/dns"

  domain_id    = var.domain_id
  name         = "api"
  ingress_ipv4 = var.ingress_ipv4
}
