# The platform's name. The address is known once the ingress has its load balancer, so the first apply may have none.
resource "linode_domain_record" "this" {
  count = var.ingress_ipv4 == null ? 0 : 1

  domain_id   = var.domain_id
  name        = var.name
  record_type = "A"
  target      = var.ingress_ipv4
  ttl_sec     = 300
}

# Nobody else may have certificates made for it.
resource "linode_domain_record" "authority" {
  domain_id   = var.domain_id
  name        = var.name
  record_type = "CAA"
  tag         = "issue"
  target      = var.certificate_authority
  ttl_sec     = 3600
}
