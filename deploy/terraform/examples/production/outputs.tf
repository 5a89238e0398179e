output "kubeconfig" {
  description = "terraform output -raw kubeconfig | base64 -d > kubeconfig"
  value       = module.cluster.kubeconfig
  sensitive   = true
}

output "database" {
  description = "For the secrets aiaas-identity, aiaas-router and aiaas-analytics, once their databases are made."
  value = {
    host           = module.database.host
    port           = module.database.port
    ca_certificate = module.database.ca_certificate
    administrator  = module.database.administrator
  }
  sensitive = true
}

output "exports" {
  description = "The AIAAS_ANALYTICS_S3_ variables."
  value = {
    url        = module.exports.endpoint
    bucket     = module.exports.bucket
    access_key = module.exports.access_key
    secret_key = module.exports.secret_key
  }
  sensitive = true
}

output "telemetry" {
  description = "For the secret monitoring-storage, of Loki and Tempo."
  value = {
    S3_HOST       = trimprefix(module.telemetry.endpoint, "https://")
    S3_REGION     = var.region
    S3_BUCKET     = module.telemetry.bucket
    S3_ACCESS_KEY = module.telemetry.access_key
    S3_SECRET_KEY = module.telemetry.secret_key
  }
  sensitive = true
}
