output "cluster_id" {
  description = "Of the cluster."
  value       = linode_lke_cluster.this.id
}

output "api_endpoints" {
  description = "Addresses of the Kubernetes API."
  value       = linode_lke_cluster.this.api_endpoints
}

output "kubeconfig" {
  description = "Credentials of an administrator of the cluster, base64."
  value       = linode_lke_cluster.this.kubeconfig
  sensitive   = true
}
