# One private bucket, and a key that opens it alone.
resource "linode_object_storage_bucket" "this" {
  label        = var.label
  region       = var.region
  acl          = "private"
  cors_enabled = false

  lifecycle_rule {
    id                                     = "unfinished"
    enabled                                = true
    abort_incomplete_multipart_upload_days = 1
  }

  lifecycle {
    prevent_destroy = true
  }
}

resource "linode_object_storage_key" "this" {
  label = var.label

  bucket_access {
    bucket_name = linode_object_storage_bucket.this.label
    region      = linode_object_storage_bucket.this.region
    permissions = "read_write"
  }
}
