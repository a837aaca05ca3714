"""Mixed-precision quantization of few-step diffusion models for torch.compile and torchao."""
