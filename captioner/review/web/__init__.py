"""The review page: find captions, see where the model looked, accept, reject or edit them."""
