variable "label" {
  type        = string
  description = "Name of the network."
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{2,29}$", var.label))
    error_message = "A label is of 3 to 30 lower case letters, digits and dashes."
  }
}

variable "region" {
  type        = string
  description = "Where it is."
  validation {
    condition     = can(regex("^[a-z]{2}-[a-z]+(-[0-9]+)?$", var.region))
    error_message = "A region is written like us-ord or us-iad-2."
  }
}

variable "cidr" {
  type        = string
  description = "Addresses of nodes and of the database."
  default     = "10.0.0.0/20"
  validation {
    condition     = can(cidrhost(var.cidr, 0)) && tonumber(split("/", var.cidr)[1]) <= 22
    error_message = "It must be a network of IPv4 in CIDR form, of /22 or larger."
  }
}
