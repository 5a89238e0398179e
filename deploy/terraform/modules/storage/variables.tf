variable "label" {
  type        = string
  description = "Name of the bucket; no other in the region may have it."
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
