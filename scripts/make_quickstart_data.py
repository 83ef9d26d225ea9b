"""Make the quickstart's data: short messages about an appointment, and the same as JSON."""

import json
from pathlib import Path
from random import Random

from lit_gpt.cli import run

INSTRUCTION = "Extract the appointment as JSON with event, person, day, time and place."
EVENTS = (
    "dentist,haircut,lunch,dinner,coffee,job interview,piano lesson,team meeting,yoga class,eye test,"
    "flu shot,parents' evening,book club,car service,flat viewing,project review,swimming lesson,"
    "breakfast,band practice,tax appointment,dance class,physio session,driving lesson,vet visit"
).split(",")
PEOPLE = (
    "Anna,Ben,Clara,David,Emma,Frank,Grace,Henry,Ivy,Jack,Karen,Leo,Maria,Nick,Olga,Paul,Rosa,"
    "Sam,Tina,Victor,Wendy,Adam,Bella,Carlos,Diana,Eric,Fiona,George,Hannah,Ian,Julia,Kevin,"
    "Laura,Martin,Nora,Oscar,Petra,Robert,Sarah,Tom,Alice,Bruno,Cora,Daniel,Elena,Felix,Gina,"
    "Hugo,Irene,James,Kate,Lucas,Mia,Noah,Olivia,Peter,Ruth,Simon,Theo,Vera,Amir,Beth,Chloe,"
    "Derek,Esther,Fred,Gloria,Harry,Isabel,Jonas,Kim,Linda,Max,Nina,Owen,Paula,Ryan,Stella,"
    "Toby,Zoe"
).split(",")
NAMES = (
    "Maple,Oak,River,Park,Station,Market,Garden,Church,Castle,Lake,Hill,Bridge,Harbour,Forest,"
    "School,Mill,King,Queen,Rose,Silver,Golden,Green,North,South,Cedar,Sunset,Spring,Victoria,"
    "Albert,Union,Liberty,Willow,Birch,Meadow"
).split(",")
KINDS = ("Street Clinic,Cafe,Hotel,Library,Road Studio,Centre,Hall,House,Restaurant,Square Office,Gym,Museum").split(
    ","
)
DAYS = ("Monday,Tuesday,Wednesday,Thursday,Friday,Saturday,Sunday").split(",")
TEMPLATES = (
    "{event} with {person} on {day} {time} at the {place}.",
    "Hi, can we move the {event} to {day} {time}? {person} will wait at the {place}.",
    "Don't forget: {person} has booked the {event} at the {place}, {day} {time}.",
    "{person} says the {event} is on {day} {time}, at the {place} as usual.",
    "See you at the {place} on {day} {time} for the {event}. Best, {person}",
    "The {place} confirmed our {event} for {day} {time}. I'll bring {person} along.",
    "Reminder from {person}: {event}, {day} {time}, {place}.",
    "Are you free {day} {time}? {person} suggests the {place} for the {event}.",
    "I'm meeting {person} for the {event} {day} {time}. It's at the {place}.",
    "{day} {time} works for {person}. Let's do the {event} at the {place}.",
)
HELD_OUT_TEMPLATES = (
    "Please note the {event} with {person}: {day} {time} in the {place}.",
    "{person} wrote: the {event} will be at the {place} on {day} {time}, don't be late!",
)


def spell_time(rng: Random, hour: int, minute: int) -> str:
    """One of the ways in which people write a time of the day."""
    clock, half = f"{(hour - 1) % 12 + 1}", "am" if hour < 12 else "pm"
    minutes = f":{minute:02}" if minute else ""
    ways = [f"at {hour:02}:{minute:02}", f"at {clock}{minutes} {half}", f"at {clock}{minutes}{half}"]
    if (hour, minute) == (12, 0):
        ways.append("at noon")
    if minute == 30:
        ways.append(f"at half past {clock} in the {'morning' if hour < 12 else 'afternoon'}")
    return rng.choice(ways)


def make_row(rng: Random, templates: tuple[str, ...], people: list[str], names: list[str]) -> dict[str, str]:
    """A message and the JSON that a careful reader would write."""
    hour, minute = rng.randrange(8, 18), rng.choice((0, 0, 15, 30, 45))
    fields = {
        "event": rng.choice(EVENTS),
        "person": rng.choice(people),
        "day": rng.choice(DAYS),
        "time": f"{hour:02}:{minute:02}",
        "place": f"{rng.choice(names)} {rng.choice(KINDS)}",
    }
    message = rng.choice(templates).format(**{**fields, "time": spell_time(rng, hour, minute)})
    message = message[0].upper() + message[1:]
    return {"instruction": INSTRUCTION, "input": message, "output": json.dumps(fields, ensure_ascii=False)}


def main(
    destination_path: Path = Path("data/quickstart"), n_train: int = 1200, n_test: int = 200, seed: int = 42
) -> None:
    """Make the quickstart's data: short messages about an appointment, and the same as JSON.

    Half of the test messages use people, places and phrasings that are in no training message.

    Args:
        destination_path: The folder that gets train.json and test.json.
        n_train: Rows to train on.
        n_test: Rows to test with.
        seed: Of all choices.
    """
    rng = Random(seed)
    people, names = PEOPLE[:-16], NAMES[:-8]
    train = [make_row(rng, TEMPLATES, people, names) for _ in range(n_train)]
    seen, test = {row["input"] for row in train}, []
    while len(test) < n_test:
        new = len(test) % 2 == 1
        templates = HELD_OUT_TEMPLATES if new and len(test) % 4 == 1 else TEMPLATES
        row = make_row(rng, templates, PEOPLE[-16:] if new else people, NAMES[-8:] if new else names)
        if row["input"] not in seen:
            test.append(row)
    destination_path.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("test", test)):
        text = json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
        (destination_path / f"{name}.json").write_text(text, encoding="utf-8")
    print(f"wrote {len(train)} training and {len(test)} test rows to {destination_path}")


if __name__ == "__main__":
    run(main)
