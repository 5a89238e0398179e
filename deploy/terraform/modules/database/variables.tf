variable "label" {
  type        = string
  description = "Name of the server."
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{2,29}$", var.label))
    error_message = "A label is of 3 to 30 lower case letters, digits and dashes."
  }
}

variable "region" {
  type        = string
  description = "Where it is: that of the network."
  validation {
    condition     = can(regex("^[a-z]{2}-[a-z]+(-[0-9]+)?$", var.region))
    error_message = "A region is written like us-ord or us-iad-2."
  }
}

variable "engine_version" {
  type        = string
  description = "Major version of PostgreSQL."
  default     = "17"
  validation {
    condition     = contains(["16", "17", "18"], var.engine_version)
    error_message = "The platform is tested with 18, and runs on 16 and 17."
  }
}

variable "type" {
  type        = string
  description = "Type of the server's nodes."
  default     = "g6-dedicated-8"
}

variable "cluster_size" {
  type        = number
  description = "Nodes of the server: with three, one may fail."
  default     = 3
  validation {
    condition     = contains([1, 2, 3], var.cluster_size)
    error_message = "One, two or three."
  }
}

variable "vpc_id" {
  type        = number
  description = "Network that it is reached by."
}

variable "subnet_id" {
  type        = number
  description = "Subnet that it is reached by."
}

variable "maintenance" {
  type        = object({ day_of_week = number, hour_of_day = number })
  description = "When it may be restarted each week: 1 is Monday; the hour is UTC."
  default     = { day_of_week = 7, hour_of_day = 4 }
  validation {
    condition = (
      contains(range(1, 8), var.maintenance.day_of_week) && contains(range(0, 24), var.maintenance.hour_of_day)
    )
    error_message = "A day from 1 to 7, an hour from 0 to 23."
  }
}
