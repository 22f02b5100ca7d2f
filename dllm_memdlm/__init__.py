"""dllm-memdlm"""
