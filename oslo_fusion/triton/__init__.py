"""How operations are fast in Triton, one file per operation. The only room that imports triton."""
