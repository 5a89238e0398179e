output "bucket" {
  description = "AIAAS_ANALYTICS_S3_BUCKET, for exports."
  value       = linode_object_storage_bucket.this.label
}

output "endpoint" {
  description = "AIAAS_ANALYTICS_S3_URL, for exports."
  value       = "https://${linode_object_storage_bucket.this.s3_endpoint}"
}

output "access_key" {
  description = "AIAAS_ANALYTICS_S3_ACCESS_KEY, for exports."
  value       = linode_object_storage_key.this.access_key
}

output "secret_key" {
  description = "AIAAS_ANALYTICS_S3_SECRET_KEY, for exports."
  value       = linode_object_storage_key.this.secret_key
  sensitive   = true
}
