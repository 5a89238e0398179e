terraform {
  required_version = ">= 1.10, < 2"
  required_providers {
    linode = { source = "linode/linode", version = "~> 3.13" }
  }

  # The state holds passwords: its bucket is private, versioned and not made here. Bucket, key, region and endpoint are given
  # by a file that is not in Git: terraform init -backend-config=backend.hcl (see backend.hcl.example).
  backend "s3" {
    use_lockfile                = true
    encrypt                     = true
    skip_credentials_validation = true
    skip_metadata_api_check     = true
    skip_region_validation      = true
    skip_requesting_account_id  = true
    skip_s3_checksum            = true
  }
}

# The token is LINODE_TOKEN.
provider "linode" {
  # Where enterprise clusters and networks of clusters are.
  api_version = "v4beta"
  # Versioning and rules of buckets are set through S3, with keys made for that moment.
  obj_use_temp_keys = true
}
