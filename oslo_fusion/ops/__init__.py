"""What each fused operation means: schema, check, reference, fake and gradient, one file per operation."""
