variable "domain_id" {
  type        = number
  description = "Of the domain, which is there before: it is shared with others."
}

variable "name" {
  type        = string
  description = "Name within the domain, such as api."
  validation {
    condition     = can(regex("^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$", var.name))
    error_message = "A name is of lower case letters, digits, dashes and dots."
  }
}

variable "ingress_ipv4" {
  type        = string
  description = "Address of the ingress's load balancer; null as long as there is none."
  default     = null
  validation {
    condition     = var.ingress_ipv4 == null || can(cidrhost("${var.ingress_ipv4}/32", 0))
    error_message = "It must be an IPv4 address."
  }
}

variable "certificate_authority" {
  type        = string
  description = "The only one that may make certificates for the name."
  default     = "letsencrypt.org"
}
