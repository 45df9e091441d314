"""What the exports are made of: a merged model and its tokenizer as llama.cpp and Ollama know them.

Inside the wing imports go strictly down too: family.py (a configuration and its tensors' names), vocabulary.py (a
tokenizer), gguf_file.py (one file of the two), llama.py (llama.cpp itself, where it is installed), turns.py (a chat
template as Ollama's).
"""
