output "vpc_id" {
  description = "Of the network."
  value       = linode_vpc.this.id
}

output "subnet_id" {
  description = "Of its only subnet."
  value       = linode_vpc_subnet.this.id
}

output "cidr" {
  description = "Addresses of the subnet."
  value       = linode_vpc_subnet.this.ipv4
}
