"""Device mesh, tensor and sequence parallel primitives, sharded data parallel."""
