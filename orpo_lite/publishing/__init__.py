"""Push the result of a run to the hub, with a model card.

Import order: licences, card_facts, edited_card, model_card, retry, account, upload, push.
"""
