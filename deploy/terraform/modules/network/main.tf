# A private network for nodes and the database: between them nothing crosses the internet.
resource "linode_vpc" "this" {
  label  = var.label
  region = var.region
  # Nodes of an enterprise cluster want both.
  ipv6 = [{ range = "/52" }]
}

resource "linode_vpc_subnet" "this" {
  vpc_id = linode_vpc.this.id
  label  = var.label
  ipv4   = var.cidr
  ipv6   = [{ range = "auto" }]
}
