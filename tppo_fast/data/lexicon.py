"""The words of the embedded session generator: three domains of topics and facets, and the facets' synonyms."""

from __future__ import annotations

TOPICS: dict[str, tuple[str, ...]] = {
    "travel": (
        "lisbon", "kyoto", "cape town", "buenos aires", "reykjavik", "istanbul", "edinburgh", "marrakesh",
        "vancouver", "prague", "costa rica", "sri lanka", "naples", "tasmania", "new orleans", "new zealand",
    ),
    "goods": (
        "coffee grinder", "mountain bike", "hiking boots", "air fryer", "electric kettle", "running shoes",
        "camping tent", "robot vacuum", "rice cooker", "sewing machine", "digital camera", "ukulele",
        "lawn mower", "office chair", "electric guitar", "camping stove",
    ),
    "skills": (
        "python", "knitting", "chess", "watercolor", "spanish", "statistics", "photography", "beekeeping",
        "pottery", "calculus", "first aid", "public speaking", "woodworking", "sourdough", "yoga", "sign language",
    ),
}  # fmt: skip
"""Domain -> what a session is about. A topic's surface is unique, its words need not be."""

FACETS: dict[str, tuple[str, ...]] = {
    "travel": (
        "hotels", "flights", "weather", "restaurants", "museums", "day trips", "airport transfer", "city map",
        "beaches", "nightlife", "train tickets", "visa rules", "local food", "scams", "car hire", "festivals",
    ),
    "goods": (
        "reviews", "price", "used", "spare parts", "repair", "manual", "warranty", "size chart", "alternatives",
        "discount code", "cleaning", "comparison", "accessories", "noise level", "delivery time", "energy use",
    ),
    "skills": (
        "for beginners", "course", "book", "exercises", "video", "cheat sheet", "common mistakes", "certificate",
        "near me", "tools", "forum", "advanced tips", "podcast", "history", "salary", "software",
    ),
}  # fmt: skip
"""Domain -> what can be asked about each of its topics."""

SYNONYMS: dict[str, str] = {
    "hotels": "places to stay",
    "restaurants": "where to eat",
    "day trips": "excursions",
    "price": "cost",
    "used": "second hand",
    "manual": "instructions",
    "course": "class",
    "exercises": "practice",
    "common mistakes": "pitfalls",
}
"""Facet -> its other form. Both ask the same."""
