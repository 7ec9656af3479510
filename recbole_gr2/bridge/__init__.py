"""The door to RecBole: data, base models, and its evaluator. Past this package nothing knows RecBole."""
