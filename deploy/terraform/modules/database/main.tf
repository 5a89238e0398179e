# One PostgreSQL for the three databases of identity, router and analytics, reached by the private network alone. Its
# backups are the provider's.
resource "linode_database_postgresql_v2" "this" {
  label        = var.label
  region       = var.region
  engine_id    = "postgresql/${var.engine_version}"
  type         = var.type
  cluster_size = var.cluster_size

  private_network = {
    vpc_id        = var.vpc_id
    subnet_id     = var.subnet_id
    public_access = false
  }

  updates = {
    frequency   = "weekly"
    day_of_week = var.maintenance.day_of_week
    hour_of_day = var.maintenance.hour_of_day
    duration    = 4
  }

  lifecycle {
    prevent_destroy = true
  }
}
