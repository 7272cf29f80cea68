"""Families of tools: how they are called and described, what people ask of them, what they return.

A `Family` holds alternatives, divided by ` | ` as in the text files. `{x}` stands for a value of
the family; values are drawn anew for each task (see toolbox.py). An outcome is what the tool
returns, ` => `, and the answer that is made of it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from blocks import words


@dataclass(frozen=True)
class Parameter:
    """A parameter of a tool, for the family's value ``key``.

    names, about: alternatives. choices: the values that are allowed, if not all are. extra: what is
    added to a question that gives an optional parameter; "" if the parameter is always given.
    """

    key: str
    names: str
    type: str = "string"
    about: str = ""
    choices: tuple[str, ...] = ()
    extra: str = ""


@dataclass(frozen=True)
class Family:
    """Tools of one purpose.

    values: placeholder to the kind of its value (a list of lists.txt, or one of toolbox.py's); a
    second value of a kind is `other`. need: the purpose in a thought. both: asks for two calls at
    once, of `{x}` and `{other}`. again: goes on with another value. marks: a regular expression
    that finds questions of the text files which this tool would take. known: whether the model
    answers what the tool is for by itself where there is no such tool.
    """

    names: str
    about: str
    parameters: tuple[Parameter, ...]
    values: dict[str, str]
    asks: str
    held_out: str
    outcomes: tuple[str, ...]
    need: str
    both: str = ""
    again: str = ""
    marks: str = ""
    known: bool = False


CITY = Parameter("city", "city | location | place | town | where | city_name",
                 about="The city. | Name of the city. | A city, such as Rome.")  # fmt: skip
NUMBERS = (
    ("a", "b"), ("x", "y"), ("first", "second"), ("left", "right"), ("number1", "number2"),
    ("n", "m"), ("one", "other"), ("p", "q"),
)  # fmt: skip


def arithmetic(rng: random.Random, name: str, sign: str) -> Family:
    """A tool for two numbers, which are named in one of many ways."""
    first, second = rng.choice(NUMBERS)
    kind = rng.choice(("integer", "number"))
    verb = {"+": "Add", "*": "Multiply", "-": "Subtract"}[sign]
    joined = {"+": "{a} and {b}", "*": "{a} by {b}", "-": "{b} from {a}"}[sign]
    word = {"+": "plus", "*": "times", "-": "minus"}[sign]
    result = {"+": "sum", "*": "product", "-": "difference"}[sign]
    return Family(
        names=f"{name} | {name}_numbers | {result} | {name}_two_numbers | calc_{name}",
        about=f"{verb} two numbers. | The {result} of two numbers. | Returns the {result}.",
        parameters=(
            Parameter("a", first, kind, "The first number."),
            Parameter("b", second, kind, "The second number."),
        ),
        values={"a": "number", "b": "number"},
        asks=f"What is {{a}} {word} {{b}}? | {{a}} {sign} {{b}} | What is {{a}} {sign} {{b}}? | "
        f"{verb} {joined}. | How much is {{a}} {word} {{b}}? | Calculate {{a}} {sign} {{b}}. | "
        f"Please {verb.lower()} {joined}.",
        held_out=f"How much is {{a}} {sign} {{b}}? | Work out {{a}} {word} {{b}} for me.",
        outcomes=tuple(
            f"{returned} => {{a}} {word} {{b}} is {{{result}}}."
            for returned in (f"{{{result}}}", f'{{"result": {{{result}}}}}')
        ),
        need=f"{{a}} {word} {{b}}",
        again=f"And {{a}} {word} {{b}}? | And {{a}} {sign} {{b}}?",
        marks=r"[-+*/=]|\d|plus|minus|times|add|subtract|multiply|divide|sum|calculate",
        known=True,
    )


FAMILIES = (
    Family(
        names="get_weather | weather | current_weather | check_weather | fetch_weather | "
        "get_current_weather | weather_report",
        about="Get the weather in a city. | The current weather of a place. | Tells the weather. | "
        "Returns the temperature and the sky of a city.",
        parameters=(
            CITY,
            Parameter(
                "unit",
                "unit | units | scale",
                about="Unit of the temperature.",
                choices=("celsius", "fahrenheit"),
                extra="in {unit}",
            ),
        ),  # fmt: skip
        values={"city": "city", "other": "city", "degrees": "degrees", "sky": "weather"},
        asks="What is the weather in {city}? | How is the weather in {city}? | Weather in {city}? |"
        " What is the weather like in {city}? | What's the weather in {city}? | "
        "Tell me the weather in {city}. | How warm is it in {city}? | Is it cold in {city}? | "
        "What is the temperature in {city}? | How is the weather in {city} today?",
        held_out="Could you look up the weather for {city}? | I am going to {city}, how is the "
        "weather there?",
        outcomes=(
            "{degrees} degrees => It is {degrees} degrees in {city}.",
            "{sky} => It is {sky} in {city}.",
            "{sky}, {degrees} degrees => It is {sky} in {city}, with {degrees} degrees.",
            '{"temperature": {degrees}, "sky": "{sky}"} => It is {sky} in {city}, with {degrees} '
            "degrees.",
            '{"city": "{city}", "degrees": {degrees}} => It is {degrees} degrees in {city}.',
            "{degrees}°C => It is {degrees} degrees in {city}.",
            "It is {sky} in {city}. => It is {sky} in {city}.",
        ),
        need="the weather in {city}",
        both="What is the weather in {city} and in {other}? | How is the weather in {city} and "
        "{other}? | Weather in {city} and {other}? | Tell me the weather in {city} and {other}.",
        again="And in {city}? | What about {city}? | And what is it like in {city}?",
        marks="weather|rain|temperature|warm|cold|hot",
    ),
    Family(
        names="get_time | current_time | time_in_city | clock | local_time | get_local_time",
        about="Get the time in a city. | The local time of a place. | Tells what time it is.",
        parameters=(CITY,),
        values={"city": "city", "other": "city", "time": "time"},
        asks="What time is it in {city}? | What is the time in {city}? | Time in {city}? | "
        "Tell me the time in {city}. | How late is it in {city}? | What time is it now in {city}?",
        held_out="What do the clocks show in {city}? | Which time is it in {city} now?",
        outcomes=(
            "{time} => It is {time} in {city}.",
            '{"time": "{time}"} => It is {time} in {city}.',
            "It is {time}. => It is {time} in {city}.",
        ),
        need="the time in {city}",
        both="What time is it in {city} and in {other}? | Tell me the time in {city} and {other}.",
        again="And in {city}? | What about {city}?",
        marks="time|clock|late|hour",
    ),
    Family(
        names="get_server_time | server_time | now | current_date_time",
        about="Get the time of the server. | Returns the date and the time now.",
        parameters=(),
        values={"time": "time"},
        asks="What time is it? | What is the time now? | Tell me the time. | How late is it?",
        held_out="Do you have the time?",
        outcomes=("{time} => It is {time}.", '{"now": "{time}"} => It is {time}.'),
        need="the time",
        marks="time|clock|late|hour|date|day|year|month",
    ),
    Family(
        names="get_capital | capital | capital_of | find_capital | lookup_capital",
        about="Get the capital of a country. | Looks up which city is the capital. | Finds the "
        "capital city of a country.",
        parameters=(
            Parameter(
                "country",
                "country | nation | name | state | land",
                about="The country. | Name of the country.",
            ),
        ),
        values={"country": "country", "other": "country", "capital": "city"},
        asks="What is the capital of {country}? | Which city is the capital of {country}? | "
        "Tell me the capital of {country}. | Capital of {country}? | Find the capital of {country}."
        " | Look up the capital of {country}.",
        held_out="Which city governs {country}? | I need to know the capital of {country}.",
        outcomes=(
            "{capital} => The capital of {country} is {capital}.",
            '{"capital": "{capital}"} => The capital of {country} is {capital}.',
        ),
        need="the capital of {country}",
        both="What are the capitals of {country} and {other}? | Tell me the capitals of {country} "
        "and {other}.",
        again="And of {country}? | What about {country}?",
        marks="capital|city",
        known=True,
    ),
    Family(
        names="search | web_search | search_web | find_pages | lookup",
        about="Search the web. | Finds pages about something. | Looks something up.",
        parameters=(
            Parameter(
                "topic",
                "query | q | topic | text | search_term",
                about="What to search for. | The search words.",
            ),
        ),
        values={"topic": "topic", "other": "topic", "found": "sentence"},
        asks="Search for {topic}. | Look up {topic}. | Search the web for {topic}. | "
        "Find something about {topic}. | Please search for {topic}.",
        held_out="See what the web has about {topic}.",
        outcomes=(
            "{found} => I found this about {topic}: {found}",
            '{"page": "{found}"} => I found this about {topic}: {found}',
        ),
        need="a search for {topic}",
        both="Search for {topic} and for {other}. | Look up {topic} and {other}.",
        again="And now for {topic}.",
        marks="look|find|search|about",
    ),
    Family(
        names="set_timer | timer | start_timer | create_timer | countdown",
        about="Set a timer. | Starts a timer that rings after some minutes.",
        parameters=(
            Parameter(
                "minutes",
                "minutes | duration | length | time_in_minutes | mins",
                "integer",
                "How many minutes. | Minutes until it rings.",
            ),
            Parameter(
                "label",
                "label | title | purpose",
                about="What the timer is for.",
                extra="for the {label}",
            ),
        ),  # fmt: skip
        values={"minutes": "small", "label": "food"},
        asks="Set a timer for {minutes} minutes. | Start a timer of {minutes} minutes. | "
        "Timer for {minutes} minutes. | Please set a timer for {minutes} minutes.",
        held_out="Make a timer ring in {minutes} minutes. | I need a timer of {minutes} minutes.",
        outcomes=(
            "ok => The timer is set for {minutes} minutes.",
            '{"status": "started"} => The timer is set for {minutes} minutes.',
            "timer set => The timer is set for {minutes} minutes.",
        ),
        need="a timer of {minutes} minutes",
        again="And one of {minutes} minutes. | And another one for {minutes} minutes.",
    ),
    Family(
        names="send_message | message | send_text | write_message | send_sms",
        about="Send a message to somebody. | Sends a text to a person.",
        parameters=(
            Parameter("to", "to | recipient | receiver | person", about="Who gets it."),
            Parameter("text", "text | message | body | content", about="The text to send."),
        ),
        values={"to": "name", "text": "sentence"},
        asks="Send {to} this message: {text} | Send a message to {to}: {text} | Write to {to}: "
        "{text} | Tell {to} this: {text} | Message {to}: {text}",
        held_out="Let {to} know this: {text}",
        outcomes=(
            "sent => I have sent the message to {to}.",
            '{"sent": true} => I have sent the message to {to}.',
        ),
        need="a message to {to}",
        again="And to {to}: {text}",
    ),
    Family(
        names="translate | translate_text | translation | to_language",
        about="Translate a word. | Translates a text into a language.",
        parameters=(
            Parameter("word", "word | text | phrase | source", about="What to translate."),
            Parameter(
                "language",
                "language | to | target | target_language",
                about="The language to translate to.",
            ),
        ),  # fmt: skip
        values={"word": "word", "language": "language", "result": "strange"},
        asks="Translate {word} to {language}. | What is {word} in {language}? | How do you say "
        "{word} in {language}? | Translate {word} into {language}.",
        held_out="Put {word} into {language}, please.",
        outcomes=(
            "{result} => In {language}, {word} is {result}.",
            '{"translation": "{result}"} => In {language}, {word} is {result}.',
        ),
        need="{word} in {language}",
        again="And {word} in {language}?",
        marks="translate|say|in (French|Spanish|German|Italian)|mean|word",
    ),
    Family(
        names="set_light | switch_light | light | control_light | lights",
        about="Switch a light on or off. | Controls the light of a room.",
        parameters=(
            Parameter("room", "room | where | location | name", about="The room."),
            Parameter(
                "state",
                "state | mode | action | position",
                about="On or off.",
                choices=("on", "off"),
            ),
        ),  # fmt: skip
        values={"room": "room", "state": "state"},
        asks="Turn {state} the light in the {room}. | Switch the light in the {room} {state}. | "
        "Turn the light {state} in the {room}. | Light {state} in the {room}, please.",
        held_out="The light in the {room} should be {state}.",
        outcomes=(
            "ok => The light in the {room} is {state}.",
            '{"light": "{state}"} => The light in the {room} is {state}.',
        ),
        need="the light in the {room} {state}",
        again="And turn it {state} in the {room}.",
    ),
    Family(
        names="convert_currency | convert | exchange | currency_converter",
        about="Convert money between currencies. | Changes an amount into another currency.",
        parameters=(
            Parameter("amount", "amount | value | money | sum", "number", "How much money."),
            Parameter("from", "from | from_currency | source | base", about="Currency it is in."),
            Parameter("to", "to | to_currency | target | into", about="Currency that is wanted."),
        ),
        values={"amount": "number", "from": "currency", "to": "currency", "result": "number"},
        asks="How much is {amount} {from} in {to}? | Convert {amount} {from} to {to}. | Change "
        "{amount} {from} into {to}. | What are {amount} {from} in {to}?",
        held_out="I have {amount} {from} and want {to}.",
        outcomes=(
            "{result} => {amount} {from} are {result} {to}.",
            '{"result": {result}} => {amount} {from} are {result} {to}.',
        ),
        need="{amount} {from} in {to}",
        again="And {amount} {from} in {to}?",
    ),
)

# Tools that fetch one property of a thing, and tools that do one thing: any with any, so that the
# model learns to compare a question's words with those of the tools.
PROPERTIES = words(
    "price weight height colour age owner size speed address birthday name length value status"
    " origin maker number password score level author date taste depth"
)
PROPERTIES_HELD_OUT = words("width rank flavour volume")
THINGS = words(
    "plant car house ship book student lamp horse river film robot order parcel train hotel song"
    " team bottle chair planet engine server ticket tower"
)
DEEDS = {
    "open": "opened", "close": "closed", "start": "started", "stop": "stopped", "delete": "deleted",
    "order": "ordered", "paint": "painted", "clean": "cleaned", "book": "booked", "move": "moved",
    "check": "checked", "repair": "repaired", "sell": "sold", "buy": "bought", "lock": "locked",
    "reset": "reset",
}  # fmt: skip
DEEDS_HELD_OUT = {"rent": "rented", "wash": "washed"}


def property_tool(rng: random.Random, held_out: bool) -> Family:
    """A tool such as get_price_of_car."""
    which = rng.choice(PROPERTIES_HELD_OUT if held_out else PROPERTIES)
    thing = rng.choice(THINGS)
    what = f"the {which} of the {thing} {{key}}"
    return Family(
        names=f"get_{which} | {thing}_{which} | find_{thing}_{which} | lookup_{which} | {which}_of",
        about=f"Get the {which} of a {thing}. | Finds the {which} of a {thing}. | The {which} of a "
        f"{thing}.",
        parameters=(Parameter("key", f"{thing} | name | id | key | {thing}_name | {thing}_id",
                              about=f"The {thing}. | Which {thing}. | Name of the {thing}."),),
        values={"key": "key", "other": "key", "result": "key"},
        asks=f"What is {what}? | Tell me {what}. | Look up {what}. | I need {what}. | "
        f"What {which} has the {thing} {{key}}? | Find {what}.",
        held_out=f"Give me {what}. | Which {which} does the {thing} {{key}} have?",
        outcomes=(
            f"{{result}} => The {which} of the {thing} {{key}} is {{result}}.",
            f'{{"{which}": "{{result}}"}} => The {which} of the {thing} {{key}} is {{result}}.',
        ),
        need=what,
        both=f"What is the {which} of the {thing}s {{key}} and {{other}}? | "
        f"Tell me the {which} of the {thing}s {{key}} and {{other}}.",
        again="And of {key}? | What about {key}?",
    )  # fmt: skip


def deed_tool(rng: random.Random, held_out: bool) -> Family:
    """A tool such as open_house."""
    verb, done = rng.choice(list((DEEDS_HELD_OUT if held_out else DEEDS).items()))
    thing = rng.choice(THINGS)
    number = rng.random() < 0.5
    kind = "integer" if number else "string"
    return Family(
        names=f"{verb}_{thing} | {verb} | {verb}_the_{thing} | {thing}_{verb}",
        about=f"{verb.capitalize()} a {thing}. | Use this to {verb} a {thing}.",
        parameters=(Parameter("key", f"{thing} | name | id | number | {thing}_id | which", kind,
                              f"The {thing}. | Which {thing}."),),
        values={"key": "small" if number else "key", "other": "small" if number else "key"},
        asks=f"{verb.capitalize()} the {thing} {{key}}. | Please {verb} the {thing} {{key}}. | "
        f"Can you {verb} the {thing} {{key}}? | I want you to {verb} the {thing} {{key}}.",
        held_out=f"Would you {verb} the {thing} {{key}}, please?",
        outcomes=(
            f"ok => I have {done} the {thing} {{key}}.",
            f'{{"status": "done"}} => I have {done} the {thing} {{key}}.',
        ),
        need=f"to {verb} the {thing} {{key}}",
        both=f"{verb.capitalize()} the {thing}s {{key}} and {{other}}. | "
        f"Please {verb} the {thing}s {{key}} and {{other}}.",
        again="And {key}, please. | Now {key}.",
    )  # fmt: skip
