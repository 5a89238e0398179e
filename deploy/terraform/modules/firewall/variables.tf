variable "label" {
  type        = string
  description = "Name of the firewall."
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{2,29}$", var.label))
    error_message = "A label is of 3 to 30 lower case letters, digits and dashes."
  }
}

variable "node_cidrs" {
  type        = list(string)
  description = "Networks that nodes talk to each other in."
  validation {
    condition     = length(var.node_cidrs) > 0 && alltrue([for cidr in var.node_cidrs : can(cidrhost(cidr, 0)) && !endswith(cidr, "/0")])
    error_message = "At least one network in CIDR form, and none that is the whole internet."
  }
}

variable "balancer_cidrs" {
  type        = list(string)
  description = "Networks that load balancers reach nodes from."
  default     = ["192.168.255.0/24"]
  validation {
    condition     = length(var.balancer_cidrs) > 0 && alltrue([for cidr in var.balancer_cidrs : can(cidrhost(cidr, 0)) && !endswith(cidr, "/0")])
    error_message = "At least one network in CIDR form, and none that is the whole internet."
  }
}
