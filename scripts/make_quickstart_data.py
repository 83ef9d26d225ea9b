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
    "Abigail,Adam,Adrian,Agnes,Alan,Alex,Alfred,Alice,Amanda,Amelia,Amir,Amy,Andrea,Andrew,Angela,Anita,Anna,Antonio,"
    "Arthur,Audrey,Barbara,Bella,Ben,Bernard,Beth,Brenda,Brian,Bridget,Bruno,Cameron,Camille,Carla,Carlos,Caroline,"
    "Catherine,Cecilia,Charles,Charlotte,Chloe,Christian,Christine,Clara,Colin,Connor,Cora,Craig,Cynthia,Daisy,Dana,"
    "Daniel,David,Deborah,Dennis,Derek,Diana,Diego,Dominic,Donald,Dorothy,Douglas,Dylan,Edgar,Edith,Edward,Eleanor,"
    "Elena,Eliza,Emily,Emma,Enrique,Eric,Erica,Ernest,Esther,Ethan,Eva,Evelyn,Fatima,Felix,Fernando,Fiona,Francis,"
    "Frank,Fred,Gabriel,Gavin,Geoffrey,George,Gerald,Gina,Giovanni,Gloria,Gordon,Grace,Graham,Greta,Gustav,Hannah,"
    "Harold,Harriet,Harry,Heather,Heidi,Helen,Henry,Herbert,Hilda,Howard,Hubert,Hugo,Ian,Ines,Ingrid,Irene,Irma,"
    "Isaac,Isabel,Ivan,Ivy,Jack,Jacob,James,Jane,Janet,Jasmine,Jason,Jeffrey,Jennifer,Jeremy,Jerome,Jessica,Joan,"
    "Joel,Johanna,Jonas,Jonathan,Joseph,Judith,Julia,Julian,Justin,Karen,Karl,Kate,Katherine,Keith,Kenneth,Kevin,Kim,"
    "Kirsten,Lars,Laura,Lauren,Lawrence,Leah,Leo,Leonard,Lewis,Liam,Lily,Linda,Logan,Lorenzo,Louis,Louise,Lucas,Lucy,"
    "Luigi,Lydia,Magnus,Malcolm,Marcus,Margaret,Maria,Marion,Mark,Martin,Matilda,Matthew,Maurice,Max,Megan,Melanie,"
    "Mia,Michael,Miriam,Mohammed,Molly,Monica,Nadia,Naomi,Natalie,Nathan,Neil,Nick,Nicole,Nigel,Nina,Noah,Nora,"
    "Norman,Olga,Oliver,Olivia,Ophelia,Oscar,Owen,Patricia,Patrick,Paul,Paula,Pedro,Penelope,Peter,Petra,Philip,"
    "Phoebe,Priya,Quentin,Rachel,Ralph,Raymond,Rebecca,Regina,Richard,Rita,Robert,Roger,Roland,Ronald,Rosa,Rosemary,"
    "Rupert,Ruth,Ryan,Sabrina,Salma,Sam,Samuel,Sandra,Sarah,Sebastian,Selma,Sharon,Sheila,Sidney,Simon,Sonia,Sophie,"
    "Stanley,Stella,Stephen,Susan,Sylvia,Teresa,Theo,Thomas,Timothy,Tina,Toby,Tom,Trevor,Ursula,Valerie,Vanessa,Vera,"
    "Veronica,Victor,Vincent,Violet,Walter,Wanda,Wendy,Wilfred,William,Xavier,Yasmin,Yusuf,Zara,Zoe"
).split(",")
NAMES = (
    "Albert,Beacon,Beech,Birch,Bishop,Blossom,Bridge,Brook,Canal,Canyon,Castle,Cedar,Chapel,Cherry,Church,Cliff,"
    "Copper,Coral,Crescent,Crown,Crystal,Dolphin,Eagle,Elm,Falcon,Forest,Fountain,Garden,Gate,Golden,Granite,Green,"
    "Harbour,Harvest,Hawthorn,Hazel,Heron,Highland,Hill,Holly,Iron,Ivory,Jasper,Jubilee,Juniper,King,Lake,Laurel,"
    "Lavender,Liberty,Lighthouse,Lion,Magnolia,Manor,Maple,Marble,Market,Meadow,Mercury,Mill,Monument,Moon,Mountain,"
    "North,Oak,Oasis,Olive,Orchard,Palace,Palm,Park,Peacock,Pearl,Phoenix,Pine,Poplar,Prince,Quarry,Queen,Rainbow,"
    "Raven,Regent,River,Robin,Rose,Royal,Sapphire,School,Seaside,Shepherd,Silver,South,Sparrow,Spring,Station,Stone,"
    "Summit,Sunset,Swan,Temple,Thistle,Tower,Trinity,Tulip,Union,Valley,Victoria,Vine,Walnut,Wharf,Willow,Windmill"
).split(",")
HELD_OUT = slice(3, None, 4)  # of people and names: only test messages have them
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


def known(words: list[str]) -> list[str]:
    """Those that training messages may have."""
    return [word for word in words if word not in words[HELD_OUT]]


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

    Half of the test messages use people and places that are in no training message, half of those new phrasings too.

    Args:
        destination_path: The folder that gets train.json and test.json.
        n_train: Rows to train on.
        n_test: Rows to test with.
        seed: Of all choices.
    """
    rng = Random(seed)
    people, names = known(PEOPLE), known(NAMES)
    train = [make_row(rng, TEMPLATES, people, names) for _ in range(n_train)]
    seen, test = {row["input"] for row in train}, []
    while len(test) < n_test:
        new = len(test) % 2 == 1
        templates = HELD_OUT_TEMPLATES if new and len(test) % 4 == 1 else TEMPLATES
        row = make_row(rng, templates, PEOPLE[HELD_OUT] if new else people, NAMES[HELD_OUT] if new else names)
        if row["input"] not in seen:
            test.append(row)
    destination_path.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("test", test)):
        text = json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
        (destination_path / f"{name}.json").write_text(text, encoding="utf-8")
    print(f"wrote {len(train)} training and {len(test)} test rows to {destination_path}")


if __name__ == "__main__":
    run(main)
