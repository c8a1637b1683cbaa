"""Models that others wrote: any nn.Module as a pure function whose calls of torch are the primitives of core.ops."""
