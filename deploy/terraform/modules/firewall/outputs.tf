output "firewall_id" {
  description = "For pools of nodes."
  value       = linode_firewall.this.id
}
