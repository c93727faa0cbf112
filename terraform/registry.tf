resource "aws_ecr_repository" "gateway" {
  #checkov:skip=CKV_AWS_136:encrypted by a key of AWS; one of our own costs a dollar a month and an operator's attention
  name                 = local.name
  image_tag_mutability = "IMMUTABLE" # a tag that was tested is what runs, also when a task is replaced at night
  force_delete         = !var.deletion_protection

  image_scanning_configuration {
    scan_on_push = true
  }

  encryption_configuration {
    encryption_type = "AES256"
  }

  tags = local.tags
}

resource "aws_ecr_lifecycle_policy" "gateway" {
  repository = aws_ecr_repository.gateway.name
  policy = jsonencode({
    rules = [
      {
        rulePriority = 1
        description  = "what a push left without a tag"
        selection    = { tagStatus = "untagged", countType = "sinceImagePushed", countUnit = "days", countNumber = 7 }
        action       = { type = "expire" }
      },
      {
        rulePriority = 2
        description  = "the last 50 images: enough to go back to, few to pay for"
        selection    = { tagStatus = "any", countType = "imageCountMoreThan", countNumber = 50 }
        action       = { type = "expire" }
      },
    ]
  })
}
