# Defaults are for production; examples/staging shows what costs little.

variable "name" {
  description = "Prefix of the name of everything that is made."
  type        = string
  default     = "ai-gateway"

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,18}[a-z0-9]$", var.name))
    error_message = "name has 3 to 20 lower-case letters, digits and hyphens, and begins with a letter."
  }
}

variable "tags" {
  description = "Tags of everything that is made."
  type        = map(string)
  default     = {}
}

variable "deletion_protection" {
  description = "Whether the load balancer, the database and what it leaves behind (a last snapshot, secrets for 30 days) are kept from an erroneous destroy."
  type        = bool
  default     = true
}

# --- network ---------------------------------------------------------------------------------------------------------

variable "vpc_cidr" {
  description = "Addresses of the network, a /16 to /20 that overlaps with nothing it is peered with."
  type        = string
  default     = "10.20.0.0/16"

  validation {
    condition     = can(cidrnetmask(var.vpc_cidr)) && try(tonumber(split("/", var.vpc_cidr)[1]) >= 16 && tonumber(split("/", var.vpc_cidr)[1]) <= 20, false)
    error_message = "vpc_cidr is an IPv4 range of /16 to /20."
  }
}

variable "availability_zones" {
  description = "Zones to be spread over, by name; at least two."
  type        = list(string)

  validation {
    condition     = length(var.availability_zones) >= 2 && length(var.availability_zones) <= 4 && length(distinct(var.availability_zones)) == length(var.availability_zones)
    error_message = "availability_zones names two to four different zones."
  }
}

variable "nat_gateway_per_zone" {
  description = "Whether each zone has a NAT gateway of its own. With one for all, its zone takes the way to the providers along when it fails."
  type        = bool
  default     = true
}

variable "allowed_cidrs" {
  description = "Who may reach the load balancer, as IPv4 ranges."
  type        = list(string)
  default     = ["0.0.0.0/0"]

  validation {
    condition     = length(var.allowed_cidrs) > 0 && alltrue([for range in var.allowed_cidrs : can(cidrnetmask(range))])
    error_message = "allowed_cidrs names at least one IPv4 range such as 203.0.113.7/32."
  }
}

# --- load balancer ---------------------------------------------------------------------------------------------------

variable "domain_name" {
  description = "Name that clients use, such as gateway.example.com."
  type        = string

  validation {
    condition     = can(regex("^([a-z0-9]([a-z0-9-]*[a-z0-9])?\\.)+[a-z]{2,}$", var.domain_name))
    error_message = "domain_name is a full domain name in lower case, such as gateway.example.com."
  }
}

variable "zone_id" {
  description = "Route 53 zone of domain_name, in which its address and its certificate's proof are kept; null: neither, and certificate_arn is needed."
  type        = string
  default     = null
}

variable "certificate_arn" {
  description = "Certificate of domain_name in ACM; null: one is made and proved in zone_id."
  type        = string
  default     = null

  validation {
    condition     = var.certificate_arn != null || var.zone_id != null
    error_message = "Give zone_id, in which a certificate can be proved, or certificate_arn."
  }
}

variable "waf_requests_per_5_minutes" {
  description = "Requests of one address in five minutes above which a web application firewall refuses it; null: no firewall."
  type        = number
  default     = null

  validation {
    condition     = var.waf_requests_per_5_minutes == null || try(var.waf_requests_per_5_minutes >= 10 && var.waf_requests_per_5_minutes <= 2000000000, false)
    error_message = "waf_requests_per_5_minutes is at least 10."
  }
}

# --- service ---------------------------------------------------------------------------------------------------------

variable "image_tag" {
  description = "Tag of the image in the repository that is made here, such as 0.1.0. Tags are immutable: a new image is a new tag."
  type        = string

  validation {
    condition     = can(regex("^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$", var.image_tag)) && var.image_tag != "latest"
    error_message = "image_tag is a tag that is not `latest`."
  }
}

variable "architecture" {
  description = "Processor that the image was built for."
  type        = string
  default     = "X86_64"

  validation {
    condition     = contains(["X86_64", "ARM64"], var.architecture)
    error_message = "architecture is X86_64 or ARM64."
  }
}

variable "cpu" {
  description = "CPU units of a task; 1024 are one virtual processor."
  type        = number
  default     = 512

  validation {
    condition     = contains([256, 512, 1024, 2048, 4096], var.cpu)
    error_message = "cpu is 256, 512, 1024, 2048 or 4096."
  }
}

variable "memory" {
  description = "Memory of a task, in MiB."
  type        = number
  default     = 1024

  validation {
    condition     = var.cpu == 256 ? contains([512, 1024, 2048], var.memory) : var.memory % 1024 == 0 && var.memory >= 2 * var.cpu && var.memory <= min(8 * var.cpu, 30720)
    error_message = "Fargate takes two to eight MiB for each CPU unit, in whole GiB (for 256 also 512 MiB), and 30 GiB at most."
  }
}

variable "min_tasks" {
  description = "Fewest tasks."
  type        = number
  default     = 2

  validation {
    condition     = var.min_tasks >= 1
    error_message = "min_tasks is at least 1."
  }
}

variable "max_tasks" {
  description = "Most tasks."
  type        = number
  default     = 10

  validation {
    condition     = var.max_tasks >= var.min_tasks
    error_message = "max_tasks is not less than min_tasks."
  }
}

variable "spot" {
  description = "Whether tasks run on spare capacity, which costs a third and may be taken away with two minutes of notice."
  type        = bool
  default     = false
}

variable "cpu_target" {
  description = "Per cent of CPU that the number of tasks is held to."
  type        = number
  default     = 60

  validation {
    condition     = var.cpu_target >= 10 && var.cpu_target <= 90
    error_message = "cpu_target is 10 to 90."
  }
}

variable "requests_per_task" {
  description = "Requests a minute for each task that the number of tasks is held to."
  type        = number
  default     = 1500

  validation {
    condition     = var.requests_per_task >= 1
    error_message = "requests_per_task is at least 1."
  }
}

variable "settings" {
  description = "Further settings of the gateway, as in its README. Secrets belong in provider_secrets."
  type        = map(string)
  default     = {}

  validation {
    condition     = alltrue([for setting in keys(var.settings) : can(regex("^[A-Z][A-Z0-9_]*$", setting)) && !can(regex("(_API_KEY|_PASSWORD|_SECRET|_PEPPER|_AUDIT_KEY)$", setting))])
    error_message = "settings are environment variables, and hold no secret: give those in provider_secrets."
  }
}

variable "provider_secrets" {
  description = "Providers' keys: the environment variable, such as OPENAI_API_KEY, and the ARN of the secret in Secrets Manager that holds its value."
  type        = map(string)
  default     = {}

  validation {
    condition     = alltrue([for variable, arn in var.provider_secrets : can(regex("^[A-Z][A-Z0-9_]*$", variable)) && can(regex("^arn:[a-z-]+:secretsmanager:[a-z0-9-]+:[0-9]{12}:secret:[^:]+$", arn))])
    error_message = "provider_secrets gives environment variables the ARNs of secrets in Secrets Manager."
  }
}

# --- database --------------------------------------------------------------------------------------------------------

variable "database_class" {
  description = "Size of the database's machine."
  type        = string
  default     = "db.t4g.medium"

  validation {
    condition     = startswith(var.database_class, "db.")
    error_message = "database_class begins with `db.`."
  }
}

variable "database_multi_az" {
  description = "Whether the database has a standby in another zone."
  type        = bool
  default     = true
}

variable "database_storage_gb" {
  description = "Storage of the database, in GiB; it grows by itself up to ten times of it."
  type        = number
  default     = 50

  validation {
    condition     = var.database_storage_gb >= 20 && var.database_storage_gb <= 6553
    error_message = "database_storage_gb is 20 to 6553."
  }
}

variable "database_password_version" {
  description = "One more makes a new password and gives it to the database and to the tasks, which are replaced. It also repairs an apply that ended between the two."
  type        = number
  default     = 1

  validation {
    condition     = var.database_password_version >= 1 && floor(var.database_password_version) == var.database_password_version
    error_message = "database_password_version is a whole number from 1."
  }
}

variable "database_backup_days" {
  description = "Days that can be gone back to, to the second."
  type        = number
  default     = 14

  validation {
    condition     = var.database_backup_days >= 1 && var.database_backup_days <= 35
    error_message = "database_backup_days is 1 to 35."
  }
}

# --- cache -----------------------------------------------------------------------------------------------------------

variable "cache_class" {
  description = "Size of the cache's machines."
  type        = string
  default     = "cache.t4g.small"

  validation {
    condition     = startswith(var.cache_class, "cache.")
    error_message = "cache_class begins with `cache.`."
  }
}

variable "cache_replicas" {
  description = "Copies of the cache in other zones, one of which takes over when it fails; 0: none, and limits are local until it is back."
  type        = number
  default     = 1

  validation {
    condition     = var.cache_replicas >= 0 && var.cache_replicas <= 5
    error_message = "cache_replicas is 0 to 5."
  }
}

# --- observability ---------------------------------------------------------------------------------------------------

variable "log_retention_days" {
  description = "Days that logs are kept."
  type        = number
  default     = 365

  validation {
    condition     = contains([1, 3, 5, 7, 14, 30, 60, 90, 120, 150, 180, 365, 400, 545, 731], var.log_retention_days)
    error_message = "log_retention_days is one of the numbers that CloudWatch takes: 1, 3, 5, 7, 14, 30, 60, 90, 120, 150, 180, 365, 400, 545, 731."
  }
}

variable "alarm_email" {
  description = "Who is told of alarms; null: only those who subscribe to the topic."
  type        = string
  default     = null
}
