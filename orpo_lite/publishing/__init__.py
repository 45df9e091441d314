"""Push the result of a run to the hub, with a model card.

Order: licences, card_facts, edited_card, model_card, retry, account, upload, push.
"""
