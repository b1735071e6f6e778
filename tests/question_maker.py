"Records for tests that train or score: lengths that differ much, texts of their own."


def make_records(count: int, start: int = 0) -> list[dict]:
    "Records of very different lengths, each one's text its own."
    return [
        {
            "id": f"r{n:03}",
            "instruction": f"What is {n} percent of {n * 37}?",
            "input": "Round down." if n % 3 == 0 else "",
            "output": f"It is {n * n * 37 / 100:.2f}." + " Divide by a hundred." * (n * 5 % 4),
        }
        for n in range(start, start + count)
    ]
