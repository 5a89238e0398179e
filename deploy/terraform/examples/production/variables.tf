variable "label" {
  type        = string
  description = "Name of everything that is made, such as aiaas-production."
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{2,20}$", var.label))
    error_message = "A label is of 3 to 21 lower case letters, digits and dashes: buckets add to it."
  }
}

variable "region" {
  type        = string
  description = "Of everything."
  validation {
    condition     = can(regex("^[a-z]{2}-[a-z]+(-[0-9]+)?$", var.region))
    error_message = "A region is written like us-ord or us-iad-2."
  }
}

variable "k8s_version" {
  type        = string
  description = "Version of Kubernetes, as the enterprise tier names it."
}

variable "administrator_cidrs" {
  type        = list(string)
  description = "Networks from which the Kubernetes API may be reached."
}

variable "baseline" {
  type        = object({ type = string, min = number, max = number })
  description = "Nodes of the services: their type, the fewest and the most."
  default     = { type = "g7-premium-8", min = 3, max = 9 }
}

variable "gpu_pools" {
  type        = map(object({ type = string, min = number, max = number }))
  description = "Pools of nodes with GPUs by name: their type, the fewest and the most."
}

variable "domain_id" {
  type        = number
  description = "Of the domain that the platform's name is in."
}

variable "ingress_ipv4" {
  type        = string
  description = "Address of the ingress's load balancer; null as long as there is none."
  default     = null
}
