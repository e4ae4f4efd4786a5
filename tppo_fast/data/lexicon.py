"""The words of the embedded session generator: three domains of topics and facets, and the facets' synonyms."""

from __future__ import annotations

TOPICS: dict[str, tuple[str, ...]] = {
    "travel": (
        "lisbon", "kyoto", "cape town", "prague", "reykjavik", "istanbul", "edinburgh", "marrakesh",
        "vancouver", "naples", "costa rica", "sri lanka", "tasmania", "bali", "new orleans", "new zealand",
    ),
    "goods": (
        "coffee grinder", "bicycle", "hiking boots", "air fryer", "kettle", "running shoes", "tent", "vacuum",
        "rice cooker", "camera", "headphones", "ukulele", "mower", "coffee machine", "guitar", "camping stove",
    ),
    "skills": (
        "python", "knitting", "chess", "watercolor", "spanish", "statistics", "photography", "beekeeping",
        "pottery", "calculus", "first aid", "juggling", "woodworking", "sourdough", "yoga", "sign language",
    ),
}  # fmt: skip
"""Domain -> what a session is about. A topic's surface is unique, its words need not be."""

FACETS: dict[str, tuple[str, ...]] = {
    "travel": (
        "hotels", "flights", "weather", "restaurants", "museums", "day trips", "airport", "map",
        "beaches", "nightlife",
    ),
    "goods": (
        "reviews", "price", "used", "spare parts", "repair", "manual", "warranty", "sizes",
        "alternatives", "discount",
    ),
    "skills": (
        "for beginners", "course", "book", "exercises", "video", "cheat sheet", "mistakes", "certificate",
        "near me", "tools",
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
    "mistakes": "pitfalls",
}
"""Facet -> its other form. Both ask the same."""
