"""Loading, decoding, chats and samplers."""
