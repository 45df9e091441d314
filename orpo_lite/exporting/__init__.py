"""Export a merged model to llama.cpp, Ollama and vLLM.

Import order: gguf_family, gguf_file, gguf_tokenizer, llama_cpp, ollama_template, targets.
"""
