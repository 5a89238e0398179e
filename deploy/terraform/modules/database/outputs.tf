output "host" {
  description = "Of the writable node."
  value       = linode_database_postgresql_v2.this.host_primary
}

output "port" {
  description = "That it listens on."
  value       = linode_database_postgresql_v2.this.port
}

output "ca_certificate" {
  description = "What its certificate comes from, base64."
  value       = linode_database_postgresql_v2.this.ca_cert
  sensitive   = true
}

output "administrator" {
  description = "Name and password of who makes databases and roles."
  value = {
    username = linode_database_postgresql_v2.this.root_username
    password = linode_database_postgresql_v2.this.root_password
  }
  sensitive = true
}
