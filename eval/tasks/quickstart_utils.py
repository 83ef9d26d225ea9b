"""Scoring of the quickstart task."""


def process_results(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """1 if the answer is the expected text to the letter; white space around it does not matter."""
    answer = results[0].strip()
    return {"exact_match": float(answer == doc["output"].strip())}
