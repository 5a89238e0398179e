output "record_ids" {
  description = "Of the records."
  value       = concat(linode_domain_record.this[*].id, [linode_domain_record.authority.id])
}
