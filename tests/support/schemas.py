"""Random JSON schemas of many keywords, most of which a random answer can finish soon."""

import random
from typing import Any

Schema = dict[str, Any]
NAMES = ["a", "b", "name", "x1", "e-", 'q"', "n\n"]
PATTERNS = ["^[a-c]+$", "b", "^x[0-9]{1,3}$", "^(ab|cd)*$", "[^a]", "^\\d{2}$", "z?$", "^\\S\\s?"]
FORMATS = ["date", "date-time", "ipv4", "uuid", "duration", "email"]
REFUSED = {  # keywords that nobody enforces
    "uniqueItems": True, "not": {"const": 1}, "contains": {"type": "string"},
    "if": {"type": "string"}, "propertyNames": {"maxLength": 3}, "minContains": 1,
    "dependentRequired": {"a": ["b"]}, "unevaluatedProperties": False, "x-guidance": {},
    "$dynamicRef": "#x", "minProperties": 9,
}  # fmt: skip


class SchemaGenerator:
    """Draws schemas from ``rng``. ``refused`` is how often a keyword comes that is refused."""

    def __init__(self, rng: random.Random, refused: float = 0.02) -> None:
        self.rng = rng
        self.refused = refused

    def draw(self) -> Schema:
        """A whole schema, at times with definitions that refer to themselves."""
        schema = self._one(self.rng.randint(1, 3))
        if self.rng.random() < 0.25:
            inner = {"anyOf": [self._one(1), {"type": "null"}]}
            schema["$defs"] = {"d": inner, "e": self._one(1)}
            tree = {"type": "object", "properties": {"next": {"$ref": "#/$defs/t"}},
                    "additionalProperties": False}  # fmt: skip
            schema["$defs"]["t"] = tree
            name = self.rng.choice("det")
            schema = {"$defs": schema.pop("$defs"), "type": "array", "maxItems": 2,
                      "prefixItems": [schema], "items": {"$ref": f"#/$defs/{name}"}}  # fmt: skip
        return schema

    def _one(self, depth: int) -> Schema:
        kinds = [self._string, self._integer, self._number, self._choice, self._plain]
        if depth:
            kinds += [self._object] * 3 + [self._array, self._array, self._any, self._all]
        schema = self.rng.choice(kinds)(depth)
        if self.rng.random() < 0.1:
            schema |= {"title": "t", "description": "anything", "default": None, "examples": [1]}
        if self.rng.random() < self.refused:
            keyword = self.rng.choice(list(REFUSED))
            schema[keyword] = REFUSED[keyword]
        return schema

    def _maybe(self, chance: float = 0.5) -> bool:
        return self.rng.random() < chance

    def _string(self, _: int) -> Schema:
        schema: Schema = {"type": "string"}
        if self._maybe(0.2):
            return schema | {"format": self.rng.choice(FORMATS)}
        if self._maybe(0.3):
            schema["pattern"] = self.rng.choice(PATTERNS)
        if self._maybe(0.3):
            schema["minLength"] = self.rng.randint(0, 2)
        return schema | {"maxLength": self.rng.randint(2, 6)}

    def _integer(self, _: int) -> Schema:
        schema: Schema = {"type": "integer"}
        if self._maybe(0.3):
            schema["multipleOf"] = self.rng.choice([2, 3, 7, 10])
        low = self.rng.randint(-50, 50)
        keyword = self.rng.choice(["minimum", "exclusiveMinimum"])
        schema |= {keyword: low} if self._maybe() else {}
        keyword = self.rng.choice(["maximum", "exclusiveMaximum"])
        return schema | {keyword: low + self.rng.randint(12, 2000)}

    def _number(self, _: int) -> Schema:
        low = self.rng.choice([-3, 0, 0.5, 17.25])
        schema: Schema = {"type": "number"}
        schema |= {"minimum": low} if self._maybe() else {}
        return schema | ({"exclusiveMaximum": low + self.rng.choice([1, 2.5, 100])})

    def _choice(self, _: int) -> Schema:
        values = ["one", 2, 2.5, None, True, "a\\b", {"k": [1]}, [], "e", -7]
        if self._maybe(0.3):
            return {"const": self.rng.choice(values)}
        return {"enum": self.rng.sample(values, self.rng.randint(1, 4))}

    def _plain(self, _: int) -> Schema:
        kinds = self.rng.sample(["boolean", "null", "integer"], self.rng.randint(1, 2))
        return {"type": kinds if len(kinds) > 1 else kinds[0]}

    def _array(self, depth: int) -> Schema:
        schema: Schema = {"type": "array", "maxItems": self.rng.randint(1, 3)}
        if self._maybe(0.3):
            schema["prefixItems"] = [self._one(depth - 1) for _ in range(self.rng.randint(1, 2))]
        schema["items"] = False if self._maybe(0.1) else self._one(depth - 1)
        if self._maybe(0.4) and schema["items"] is not False:
            schema["minItems"] = self.rng.randint(0, schema["maxItems"])
        return schema

    def _object(self, depth: int) -> Schema:
        names = self.rng.sample(NAMES, self.rng.randint(0, 3))
        schema: Schema = {"type": "object"}
        if names:
            schema["properties"] = {name: self._one(depth - 1) for name in names}
        required = [name for name in names if self._maybe()]
        required += [] if self._maybe(0.9) else ["more"]
        schema |= {"required": required} if required else {}
        others = self.rng.random()
        if others < 0.6 and "more" not in required:
            schema["additionalProperties"] = False
        elif others < 0.8:
            schema["additionalProperties"] = self._one(0)
        if others < 0.6 and self._maybe(0.2):
            schema["patternProperties"] = {"^p[0-9]$": self._one(0)}
        if set(names) <= set(required) and self._maybe(0.3):
            schema["minProperties"] = len(required) + self.rng.randint(0, 1)
            schema["maxProperties"] = len(required) + self.rng.randint(1, 2)
        return schema

    def _any(self, depth: int) -> Schema:
        keyword = self.rng.choice(["anyOf", "anyOf", "oneOf"])
        return {keyword: [self._one(depth - 1) for _ in range(self.rng.randint(2, 3))]}

    def _all(self, depth: int) -> Schema:
        first = self._object(depth)
        return {"allOf": [first, {"type": "object", "required": ["z"], "maxProperties": 5}]}
