"""Make the demo's data: sentences about orders -> one line of JSON, as JSONL in one of TRL's formats.

    python recipes/data/make_extraction.py --out data/ --train 960 --test 96 --difficulty 2

writes `data/train.jsonl` and `data/test.jsonl`.  An answer always has these keys in this order:

| key   | value                                                                                       |
| ----- | ------------------------------------------------------------------------------------------- |
| who   | the recipient, copied                                                                       |
| qty   | an integer; the sentence may say "3", "three", "a pair of" or "half a dozen"                |
| item  | the product in the singular; the sentence may also name a cancelled or replaced product     |
| price | "24.50 EUR", from "€24.50", "EUR 24.5", "24.50 euros"; null if no price is agreed           |
| due   | the delivery date in ISO form, never the order date that may stand beside it                |
| city  | the destination, never the shop; null if the order is collected                             |
| gift  | true or false                                                                               |

The same arguments give the same files on every machine.  Train and test share no sentence and no pair of recipient and
product; a third of the test's recipients have names that training never shows, so those must be copied, not recalled.
`--difficulty` 1: digits, two date forms with two-digit days, nothing misleading.  2: all spellings, null values, a
misleading detail in about every second sentence.  3: one or two misleading details in most sentences.
`--no_dates` leaves the delivery date out of sentences and answers, and with it a quarter of the tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

SYSTEM = "Order to JSON."


def words(text: str, separator: str | None = None) -> tuple[str, ...]:
    """The parts of `text`, split at white space or at `separator`."""
    return tuple(text.split(separator))


FIRST_NAMES = words(
    "Anna Ben Carla David Elena Felix Grace Henry Irene Jonas Karin Leo Maria Nils Olga Paul Rosa Simon Tara Victor "
    "Wendy Adam Bella Colin Diana Erik Fiona Greta Hugo Ines Abdul Aiko Anwar Asha Bogdan Chiara Deniz Ebru Emre "
    "Fumiko Gita Haruki Ingrid Ivana Javier Kemal Kwame Lakshmi Mbali Mehmet Mirela Nadia Njeri Ondrej Oya Pavel Qiang "
    "Ravi Rania Sanjay Selma Sinan Svetlana Tariq Thabo Umut Vikram Wanjiru Xiomara Yasmin Yusuf Zeynep Zoltan"
)
LAST_NAMES = words(
    "Berg Costa Dale Evans Fischer Grant Hansen Iversen Jensen Keller Lopez Meyer Novak Owens Peters Quinn Rossi Silva "
    "Turner Weber Young Adler Brooks Cole Duarte Adeyemi Aydin Balogun Chaudhry Dlamini Eriksen Farkas Gupta Horvat "
    "Iqbal Jovanovic Khan Lindqvist Mwangi Nakamura Ozturk Popescu Qureshi Rahman Suzuki Takahashi Ueda Vasquez "
    "Watanabe Yamada"
)
TEST_ONLY_FIRST_NAMES = words("Amir Birgit Chen Dmitri Esra Farah Goran Hanne Imran Jelena Kofi Leila Mateo Noor Priya")
TEST_ONLY_LAST_NAMES = words(
    "Abara Bianchi Okafor Demir Haddad Ito Kaya Larsen Moreau Nguyen Petrov Sato Tanaka Yilmaz"
)
COLOURS = ("red", "blue", "green", "black", "white", "grey")
PRODUCTS = words(
    "kettle|desk lamp|office chair|backpack|blanket|teapot|notebook|wall clock|rain jacket|water bottle|keyboard|"
    "bookshelf|mirror|candle|garden hose|toolbox|coffee mug|pillow|bike helmet|suitcase|rug|vase|headset|scarf|"
    "umbrella",
    "|",
)
CITIES = words(
    "Lisbon Oslo Madrid Vienna Dublin Prague Zurich Athens Warsaw Porto Lyon Bergen Seville Turin Ghent Leeds Bremen "
    "Krakow Malmo Basel Nice Cork Graz Utrecht"
)
MONTHS = words("January February March April May June July August September October November December")
NUMBER_WORDS = words("zero one two three four five six seven eight nine ten eleven twelve")
CURRENCIES = {"EUR": ("€", "euros"), "USD": ("$", "dollars"), "GBP": ("£", "pounds")}
QUANTITIES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 15, 18, 20, 24, 30, 36, 40, 48)
DISTRACTION_RATE = {1: 0.0, 2: 0.17, 3: 0.5}  # for each of three places in a sentence
NULL_RATE = {1: 0.0, 2: 0.2, 3: 0.25}

OPENINGS = (
    "{who} ordered {goods}{swap}, {price}",
    "{who} wants {goods}{swap}, {price}",
    "Send {who} {goods}{swap}, {price}",
    "{goods} for {who}{swap}, {price}",
    "New order by {who}: {goods}{swap}, {price}",
    "Please book {goods} for {who}{swap}, {price}",
    "We sold {who} {goods}{swap}, {price}",
    "{who} would like {goods}{swap}, {price}",
    "For {who}: {goods}{swap}, {price}",
    "{who} needs {goods}{swap}, {price}",
)
PRICES = ("{price} each", "{price} apiece", "at {price} each", "unit price {price}", "{price} per piece")
NO_PRICES = ("price to follow", "price not agreed", "price open")
SWAPS = (" instead of {other}", " (not {other})", ", {other} cancelled", ", no longer {other}")
DUES = ("due {due}", "deliver by {due}", "needed on {due}", "to arrive {due}", "delivery {due}")
DOUBLE_DUES = (
    "ordered {other}, due {due}",
    "due {due}, ordered {other}",
    "moved from {other} to {due}",
    "paid {other}, delivery {due}",
    "due {due}, not {other}",
)
PLACES = ("ship to {city}", "to {city}", "destination {city}", "goes to {city}", "address in {city}")
DOUBLE_PLACES = ("from {other} to {city}", "ship to {city}, not {other}", "sold in {other}, goes to {city}")
NO_PLACES = ("will collect it", "pickup", "no shipping")
NO_PLACES_MISLEADING = ("pickup at our {other} shop", "collected in {other}")
GIFTS = ("gift wrapped", "it is a present", "as a gift", "wrap it as a gift")
NO_GIFTS = ("", "", "no gift wrap", "not a gift", "plain packaging")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """The facts of one sentence; `price_cents` and `city` may be absent, `due` is None where dates are left out."""

    who: str
    qty: int
    item: str
    price_cents: int | None
    currency: str
    due: datetime.date | None
    city: str | None
    gift: bool

    def answer(self) -> str:
        """The compact JSON that the model has to write."""
        price = None if self.price_cents is None else f"{self.price_cents / 100:.2f} {self.currency}"
        fields = {
            "who": self.who,
            "qty": self.qty,
            "item": self.item,
            "price": price,
            **({} if self.due is None else {"due": self.due.isoformat()}),
            "city": self.city,
            "gift": self.gift,
        }
        return json.dumps(fields, separators=(",", ":"), ensure_ascii=False)


class Writer:
    """Puts orders into words; all chance comes from `rng`."""

    def __init__(self, rng: random.Random, difficulty: int) -> None:
        self.rng = rng
        self.difficulty = difficulty

    def sentence(self, order: Order) -> str:
        """One order as text: an opening, then delivery date, place and gift in any order."""
        swap = ""
        if self.distracts():
            swap = self.pick(SWAPS).format(other=self.goods(self.pick(QUANTITIES), self.other_item(order.item)))
        opening = self.pick(OPENINGS).format(
            who=order.who, goods=self.goods(order.qty, order.item), swap=swap, price=self.price(order)
        )
        due = "" if order.due is None else self.due(order.due)
        parts = [due, self.place(order.city), self.pick(GIFTS if order.gift else NO_GIFTS)]
        parts = [part for part in parts if part]
        self.rng.shuffle(parts)
        text = f"{opening}, {', '.join(parts)}."
        return text[0].upper() + text[1:]

    def goods(self, quantity: int, item: str) -> str:
        return f"{self.quantity(quantity)} {item if quantity == 1 else plural(item)}"

    def quantity(self, value: int) -> str:
        choices = [str(value)]
        if self.difficulty > 1:
            if value < len(NUMBER_WORDS):
                choices.append(NUMBER_WORDS[value])
            special = {
                1: "a single",
                2: "a pair of",
                6: "half a dozen",
                12: "a dozen",
                24: "two dozen",
                36: "three dozen",
            }
            if value in special:
                choices.append(special[value])
        return self.pick(choices)

    def price(self, order: Order) -> str:
        if order.price_cents is None:
            return self.pick(NO_PRICES)
        whole, cents = divmod(order.price_cents, 100)
        amount = f"{whole}.{cents:02d}" if cents or self.rng.random() < 0.5 else str(whole)
        symbol, word = CURRENCIES[order.currency]
        forms = [f"{symbol}{amount}", f"{amount} {word}", f"{order.currency} {amount}"]
        return self.pick(PRICES).format(price=self.pick(forms[:2] if self.difficulty == 1 else forms))

    def due(self, due: datetime.date) -> str:
        if not self.distracts():
            return self.pick(DUES).format(due=self.date(due))
        other = due - datetime.timedelta(days=self.rng.randint(2, 40))
        return self.pick(DOUBLE_DUES).format(due=self.date(due), other=self.date(other))

    def date(self, day: datetime.date) -> str:
        month = MONTHS[day.month - 1]
        forms = [day.isoformat(), f"{day.day:02d} {month} {day.year}"]
        if self.difficulty > 1:
            forms = [
                day.isoformat(),
                f"{day.day} {month} {day.year}",
                f"{month} {day.day}, {day.year}",
                f"{day.day} {month[:3]} {day.year}",
                f"{day.day:02d}.{day.month:02d}.{day.year}",
            ]
        return self.pick(forms)

    def place(self, city: str | None) -> str:
        misleading = self.distracts()
        other = self.pick([name for name in CITIES if name != city])
        if city is None:
            return self.pick(NO_PLACES_MISLEADING if misleading else NO_PLACES).format(other=other)
        return self.pick(DOUBLE_PLACES if misleading else PLACES).format(city=city, other=other)

    def other_item(self, item: str) -> str:
        return self.pick([product for product in PRODUCTS if not item.endswith(product)])

    def distracts(self) -> bool:
        return self.rng.random() < DISTRACTION_RATE[self.difficulty]

    def pick(self, choices: Sequence[str]) -> str:
        return self.rng.choice(choices)


def plural(item: str) -> str:
    """English plural of the products above: `scarf` -> `scarves`, `bookshelf` -> `bookshelves`, otherwise an s."""
    if item.endswith("f"):
        return f"{item[:-1]}ves"
    return f"{item}s"


def all_items() -> list[str]:
    """Products with and without a colour."""
    return [*PRODUCTS, *(f"{colour} {product}" for colour in COLOURS for product in PRODUCTS)]


def is_held_out(first: int, last: int, item: int) -> bool:
    """Whether this recipient and this product (indices) may meet only in the test: one pair in four."""
    return (first + 3 * last + 7 * item) % 4 == 0


def train_recipient(rng: random.Random, item: int) -> str:
    """A known name that is allowed to meet this product in training."""
    while True:
        first, last = rng.randrange(len(FIRST_NAMES)), rng.randrange(len(LAST_NAMES))
        if not is_held_out(first, last, item):
            return f"{FIRST_NAMES[first]} {LAST_NAMES[last]}"


def test_recipient(rng: random.Random, item: int) -> str:
    """One time in three a name that training never shows, otherwise a known name with a product it never met."""
    if rng.random() < 1 / 3:
        return f"{rng.choice(TEST_ONLY_FIRST_NAMES)} {rng.choice(TEST_ONLY_LAST_NAMES)}"
    while True:
        first, last = rng.randrange(len(FIRST_NAMES)), rng.randrange(len(LAST_NAMES))
        if is_held_out(first, last, item):
            return f"{FIRST_NAMES[first]} {LAST_NAMES[last]}"


def draw_order(
    rng: random.Random, recipient: Callable[[random.Random, int], str], null_rate: float, *, dates: bool
) -> Order:
    """One random order."""
    items = all_items()
    item = rng.randrange(len(items))
    cents = 100 * rng.randint(2, 180) + rng.choice((0, 0, 50, 95, 99, 25))
    return Order(
        who=recipient(rng, item),
        qty=rng.choice(QUANTITIES),
        item=items[item],
        price_cents=None if rng.random() < null_rate else cents,
        currency=rng.choice(tuple(CURRENCIES)),
        due=datetime.date(2025, 2, 15) + datetime.timedelta(days=rng.randrange(640)) if dates else None,
        city=None if rng.random() < null_rate else rng.choice(CITIES),
        gift=rng.random() < 0.4,
    )


def make_split(
    split: str, count: int, *, seed: int, difficulty: int, dates: bool = True, layout: str = "messages"
) -> list[dict[str, list[dict[str, str]]]]:
    """`count` samples of one split ("train" or "test"), every sentence once; `layout` is one of `LAYOUTS`."""
    rng = random.Random(f"{split}-{seed}-{difficulty}")
    writer = Writer(rng, difficulty)
    recipient = train_recipient if split == "train" else test_recipient
    samples: dict[str, str] = {}
    while len(samples) < count:
        order = draw_order(rng, recipient, NULL_RATE[difficulty], dates=dates)
        samples.setdefault(writer.sentence(order), order.answer())
    return [LAYOUTS[layout](sentence, answer) for sentence, answer in samples.items()]


def messages(sentence: str, answer: str) -> dict[str, list[dict[str, str]]]:
    """One line of TRL's conversational format."""
    turns = (("system", SYSTEM), ("user", sentence), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def prompt_completion(sentence: str, answer: str) -> dict[str, list[dict[str, str]]]:
    """The same as prompt and completion: TRL then takes the loss on the answer only."""
    *prompt, completion = messages(sentence, answer)["messages"]
    return {"prompt": prompt, "completion": [completion]}


LAYOUTS = {"messages": messages, "prompt_completion": prompt_completion}


def write_jsonl(path: Path, rows: Sequence[dict[str, list[dict[str, str]]]]) -> None:
    """One JSON object a line, UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl and test.jsonl")
    parser.add_argument("--train", type=int, default=960, help="training samples")
    parser.add_argument("--test", type=int, default=96, help="held-out samples")
    parser.add_argument("--seed", type=int, default=7, help="another seed gives other samples")
    parser.add_argument("--difficulty", type=int, choices=(1, 2, 3), default=2, help="see the top of this file")
    parser.add_argument("--no_dates", action="store_true", help="no delivery dates: shorter sentences and answers")
    parser.add_argument("--format", choices=tuple(LAYOUTS), default="messages", help="of a line")
    options = parser.parse_args(arguments)
    if options.train < 1 or options.test < 1:
        parser.error(f"--train {options.train} and --test {options.test} must both be at least 1")
    for split, count in (("train", options.train), ("test", options.test)):
        path = options.out / f"{split}.jsonl"
        rows = make_split(
            split,
            count,
            seed=options.seed,
            difficulty=options.difficulty,
            dates=not options.no_dates,
            layout=options.format,
        )
        write_jsonl(path, rows)
        print(f"{path}: {count} samples")


if __name__ == "__main__":
    main()
