"""Conversion of checkpoints between Hugging Face folders and Megatron's `torch_dist`, streamed and with a proof.

No model is built: the name tables of `weights` know every tensor. A conversion is a list of parts, one output file
each. A process holds the tensors of one parameter at a time.
"""
