variable "label" {
  type        = string
  description = "Name of the cluster."
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{2,29}$", var.label))
    error_message = "A label is of 3 to 30 lower case letters, digits and dashes."
  }
}

variable "region" {
  type        = string
  description = "Where it is: one that has the types of nodes that are asked for."
  validation {
    condition     = can(regex("^[a-z]{2}-[a-z]+(-[0-9]+)?$", var.region))
    error_message = "A region is written like us-ord or us-iad-2."
  }
}

variable "k8s_version" {
  type        = string
  description = "Version of Kubernetes, as the enterprise tier names it."
  validation {
    condition     = can(regex("^v1\\.[0-9]{2}\\.[0-9]+\\+lke[0-9]+$", var.k8s_version))
    error_message = "An enterprise version is written like v1.31.8+lke5."
  }
}

variable "vpc_id" {
  type        = number
  description = "Network of the nodes."
}

variable "subnet_id" {
  type        = number
  description = "Subnet of the nodes, of IPv4 and IPv6."
}

variable "firewall_id" {
  type        = number
  description = "Firewall of all nodes."
}

variable "administrator_cidrs" {
  type        = list(string)
  description = "Networks from which the Kubernetes API may be reached."
  validation {
    condition     = length(var.administrator_cidrs) > 0 && alltrue([for cidr in var.administrator_cidrs : can(cidrhost(cidr, 0)) && !endswith(cidr, "/0")])
    error_message = "At least one network in CIDR form, and none that is the whole internet."
  }
}

variable "baseline" {
  type        = object({ type = string, min = number, max = number })
  description = "Nodes of the services: their type, the fewest and the most."
  default     = { type = "g7-premium-8", min = 3, max = 9 }
  validation {
    condition     = var.baseline.min >= 3 && var.baseline.max >= var.baseline.min
    error_message = "At least three nodes, so that a replica is left when one fails, and the most not below the fewest."
  }
}

variable "gpu_pools" {
  type        = map(object({ type = string, min = number, max = number }))
  description = "Pools of nodes with GPUs by name: their type, the fewest and the most."
  default     = {}
  validation {
    condition     = alltrue([for pool in values(var.gpu_pools) : pool.min >= 1 && pool.max >= pool.min])
    error_message = "At least one node in each pool, and the most not below the fewest."
  }
}
