"""Training of the token reward model: labelled responses in, a folder that plain transformers loads out.

``settings`` is torch-free. The model itself, frozen or not, is ``tppo_fast.rewards.token_model``.
"""

from __future__ import annotations
