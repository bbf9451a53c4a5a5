"""Multimodal deep belief networks that ground number words in images. See groundeep/README.md."""
