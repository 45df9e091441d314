"""A merged model as llama.cpp, Ollama and vLLM take it.

Order: gguf_family, gguf_file, gguf_tokenizer, llama_cpp, ollama_template, targets.
"""
