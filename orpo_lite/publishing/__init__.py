"""Push the result of a run to the Hugging Face Hub, with a model card.

Import order: licences, card_facts, card_loading, edited_card, model_card, retry, account, upload,
push.
"""
