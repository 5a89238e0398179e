locals {
  # The cluster leaves pools with this tag alone; they are resources of their own, so that one is added or removed without
  # touching the others.
  external = "aiaas-external"
}

resource "linode_lke_cluster" "this" {
  label       = var.label
  region      = var.region
  k8s_version = var.k8s_version
  tier        = "enterprise"
  vpc_id      = var.vpc_id
  subnet_id   = var.subnet_id
  stack_type  = "ipv4-ipv6"

  external_pool_tags = [local.external]

  control_plane {
    high_availability  = true
    audit_logs_enabled = true
    acl {
      enabled = true
      addresses {
        ipv4 = var.administrator_cidrs
      }
    }
  }

  # Services, and everything that is no engine.
  pool {
    label       = "baseline"
    type        = var.baseline.type
    firewall_id = var.firewall_id
    labels      = { "aiaas.dev/pool" = "baseline" }
    autoscaler {
      min = var.baseline.min
      max = var.baseline.max
    }
  }

  lifecycle {
    prevent_destroy = true
    # The autoscaler's to change.
    ignore_changes = [pool[0].count]
  }
}

# Engines, and nothing else: the chart's engineDefaults select the label and tolerate the taint.
resource "linode_lke_node_pool" "gpu" {
  for_each = var.gpu_pools

  cluster_id      = linode_lke_cluster.this.id
  label           = each.key
  type            = each.value.type
  firewall_id     = var.firewall_id
  update_strategy = "rolling_update"
  tags            = [local.external]
  labels          = { "aiaas.dev/pool" = "gpu" }

  taint {
    key    = "nvidia.com/gpu"
    value  = "present"
    effect = "NoSchedule"
  }

  autoscaler {
    min = each.value.min
    max = each.value.max
  }

  lifecycle {
    ignore_changes = [node_count]
  }
}
