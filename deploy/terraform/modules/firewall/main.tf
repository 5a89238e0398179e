# What reaches nodes: other nodes, and load balancers on node ports. All else is dropped; who may talk to whom among pods is
# the chart's network policies.
resource "linode_firewall" "this" {
  label           = var.label
  inbound_policy  = "DROP"
  outbound_policy = "ACCEPT"

  dynamic "inbound" {
    for_each = toset(["TCP", "UDP", "ICMP"])
    content {
      label    = "nodes-${lower(inbound.value)}"
      action   = "ACCEPT"
      protocol = inbound.value
      ipv4     = var.node_cidrs
    }
  }

  dynamic "inbound" {
    for_each = toset(["TCP", "UDP"])
    content {
      label    = "balancers-${lower(inbound.value)}"
      action   = "ACCEPT"
      protocol = inbound.value
      ports    = "30000-32767"
      ipv4     = var.balancer_cidrs
    }
  }
}
