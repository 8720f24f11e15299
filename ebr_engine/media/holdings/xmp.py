"""XMP: what of it has to change with the picture, and what comes into it from other kinds of tags.

Packets are changed by their namespaces, whatever prefixes they use; one that is no XML stays as it is.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from xml.dom import minidom
from xml.parsers.expat import ExpatError

RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
DC, XMP, EXIF, TIFF = "http://purl.org/dc/elements/1.1/", *(f"http://ns.adobe.com/{n}/1.0/" for n in ("xap", "exif", "tiff"))
PHOTOSHOP = "http://ns.adobe.com/photoshop/1.0/"
IPTC_CORE = "http://iptc.org/std/Iptc4xmpCore/1.0/xmlns/"
CAMERA, CONTAINER = "http://ns.google.com/photos/1.0/camera/", "http://ns.google.com/photos/1.0/container/"
ITEM = "http://ns.google.com/photos/1.0/container/item/"
GAIN_MAP = "http://ns.adobe.com/hdr-gain-map/1.0/"
NOTE = "http://ns.adobe.com/xmp/note/"
APPLE_GAIN_MAP = "http://ns.apple.com/HDRGainMap/1.0/"
_PREFIXES = {DC: "dc", XMP: "xmp", EXIF: "exif", TIFF: "tiff", PHOTOSHOP: "photoshop", IPTC_CORE: "Iptc4xmpCore", NOTE: "xmpNote"}
_MOTION = ("MotionPhoto", "MicroVideo")  # beginnings of the properties' names

# IIM record 2 → XMP, by the IPTC's own mapping; a bag or a list of authors takes all values, a text in one language the first.
_FROM_IIM = {
    5: (DC, "title", "alt"), 10: (PHOTOSHOP, "Urgency", ""), 15: (PHOTOSHOP, "Category", ""),
    20: (PHOTOSHOP, "SupplementalCategories", "bag"), 25: (DC, "subject", "bag"), 40: (PHOTOSHOP, "Instructions", ""),
    55: (PHOTOSHOP, "DateCreated", ""), 80: (DC, "creator", "seq"), 85: (PHOTOSHOP, "AuthorsPosition", ""),
    90: (PHOTOSHOP, "City", ""), 92: (IPTC_CORE, "Location", ""), 95: (PHOTOSHOP, "State", ""),
    100: (IPTC_CORE, "CountryCode", ""), 101: (PHOTOSHOP, "Country", ""), 103: (PHOTOSHOP, "TransmissionReference", ""),
    105: (PHOTOSHOP, "Headline", ""), 110: (PHOTOSHOP, "Credit", ""), 115: (PHOTOSHOP, "Source", ""), 116: (DC, "rights", "alt"),
    120: (DC, "description", "alt"), 122: (PHOTOSHOP, "CaptionWriter", ""),
}  # fmt: skip

Property = tuple[str, str, str, list[str]]  # namespace, name, "" or "alt", "bag", "seq", and the values


def from_iim(texts: Mapping[int, list[str]]) -> list[Property]:
    """IPTC's values as XMP properties."""
    return [(*_FROM_IIM[number], values) for number, values in sorted(texts.items()) if number in _FROM_IIM]


def parsed(packet: bytes) -> minidom.Document | None:
    """The packet as a document; None for what is no XML, or has no RDF."""
    begin, end = packet.find(b"<"), packet.rfind(b">")
    try:
        document = minidom.parseString(packet[begin : end + 1])
    except (ExpatError, ValueError, LookupError):
        return None
    return document if document.getElementsByTagNameNS(RDF, "RDF") else None


def packed(document: minidom.Document) -> bytes:
    """The document as a packet."""
    for node in [n for n in document.childNodes if n.nodeType == n.PROCESSING_INSTRUCTION_NODE and n.target == "xpacket"]:
        document.removeChild(node)
    body = document.documentElement.toxml()
    head = '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n'
    return f'{head}{body}\n<?xpacket end="w"?>'.encode()


def value(packet: bytes, namespace: str, name: str) -> str | None:
    """A simple property's value."""
    document = parsed(packet)
    if document is None:
        return None
    for description in document.getElementsByTagNameNS(RDF, "Description"):
        if description.hasAttributeNS(namespace, name):
            return description.getAttributeNS(namespace, name)
    for element in document.getElementsByTagNameNS(namespace, name):
        return "".join(node.data for node in element.childNodes if node.nodeType == node.TEXT_NODE).strip()
    return None


def orientation(packet: bytes) -> int:
    """tiff:Orientation; 1 where it is not said."""
    text = value(packet, TIFF, "Orientation") if b"Orientation" in packet else None
    return int(text) if text in {*"12345678"} else 1


def upright(packet: bytes, width: int, height: int) -> bytes:
    """The same packet for an upright picture of this size, without thumbnails; unchanged where nothing of it is said."""
    if not any(word in packet for word in (b"Orientation", b"PixelXDimension", b"ImageWidth", b"Thumbnails")):
        return packet
    if (document := parsed(packet)) is None:  # no XML, but some programs look for the words
        return re.sub(rb'(tiff:Orientation(?:=["\']|>))[2-8]', rb"\g<1>1", packet)
    numbers = {(TIFF, "Orientation"): 1, (EXIF, "PixelXDimension"): width, (EXIF, "PixelYDimension"): height}
    numbers |= {(TIFF, "ImageWidth"): width, (TIFF, "ImageLength"): height}
    changed = _set(document, {key: str(number) for key, number in numbers.items()})
    changed |= _remove(document, lambda node: node.namespaceURI == XMP and node.localName == "Thumbnails")
    return packed(document) if changed else packet


def without(packet: bytes, motion: bool = False, gain_map: bool = False) -> bytes:
    """The packet without what promises a motion photo's clip, or a gain map, behind the picture."""
    if (document := parsed(packet)) is None:
        return packet
    changed = False
    if motion:
        changed |= _remove(document, lambda n: n.namespaceURI == CAMERA and (n.localName or "").startswith(_MOTION))
        changed |= _remove_items(document, {"MotionPhoto"})
    if gain_map:
        changed |= _remove(document, lambda node: node.namespaceURI in (GAIN_MAP, APPLE_GAIN_MAP))
        changed |= _remove_items(document, {"GainMap"})
    return packed(document) if changed else packet


def item_lengths(packet: bytes) -> list[tuple[str, int]]:
    """(meaning, bytes) of what a container directory says to follow the picture, in order."""
    document = parsed(packet) if b"Semantic" in packet else None
    if document is None:
        return []
    found = []
    for item in _items(document):
        meaning, length = _property(item, "Semantic"), _property(item, "Length") or "0"
        padding = _property(item, "Padding") or "0"
        found.append((meaning or "", (int(length) if length.isdigit() else 0) + (int(padding) if padding.isdigit() else 0)))
    return found


def with_item_length(packet: bytes, meaning: str, length: int) -> bytes:
    """The packet with another length of an item that follows the picture."""
    if (document := parsed(packet)) is None:
        return packet
    changed = False
    for item in _items(document):
        if _property(item, "Semantic") == meaning and _property(item, "Length") != str(length):
            changed = True
            if item.hasAttributeNS(ITEM, "Length"):
                item.setAttributeNS(ITEM, item.getAttributeNodeNS(ITEM, "Length").name, str(length))
            for element in item.getElementsByTagNameNS(ITEM, "Length"):
                element.firstChild.data = str(length)
    return packed(document) if changed else packet


def added(packet: bytes | None, properties: Iterable[Property]) -> bytes | None:
    """The packet with properties that it does not have yet; None where it is no XML."""
    empty = (
        f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="{RDF}"><rdf:Description rdf:about=""/></rdf:RDF></x:xmpmeta>'
    )
    if (document := parsed(packet or empty.encode())) is None:
        return None
    changed = False
    rdf = document.getElementsByTagNameNS(RDF, "RDF")[0]
    for namespace, name, form, values in properties:
        if not values or _has(document, namespace, name):
            continue
        changed = True
        description = _new(document, rdf, "Description", {"about": ""})
        prefix = _PREFIXES[namespace]
        description.setAttribute(f"xmlns:{prefix}", namespace)
        element = document.createElementNS(namespace, f"{prefix}:{name}")
        description.appendChild(element)
        if not form:
            element.appendChild(document.createTextNode(_printable(values[0])))
            continue
        items = _new(document, element, {"alt": "Alt", "bag": "Bag", "seq": "Seq"}[form])
        for text in values[:1] if form == "alt" else values:
            item = _new(document, items, "li")
            if form == "alt":
                item.setAttribute("xml:lang", "x-default")
            item.appendChild(document.createTextNode(_printable(text)))
    return packed(document) if changed else packet


def merged(packet: bytes, extension: bytes) -> bytes | None:
    """A packet and its extension, which JPEG keeps apart, in one; None where either is no XML."""
    main, more = parsed(packet), parsed(extension)
    if main is None or more is None:
        return None
    _remove(main, lambda node: node.namespaceURI == NOTE and node.localName == "HasExtendedXMP")
    rdf = main.getElementsByTagNameNS(RDF, "RDF")[0]
    for node in more.getElementsByTagNameNS(RDF, "RDF")[0].childNodes:
        if node.nodeType == node.ELEMENT_NODE:
            rdf.appendChild(main.importNode(node, True))
    return packed(main)


def split(packet: bytes) -> tuple[bytes, bytes, str]:
    """A small packet that points to the whole as its extension, the extension, and its name, for a JPEG."""
    name = hashlib.md5(packet, usedforsecurity=False).hexdigest().upper()
    return added(None, [(NOTE, "HasExtendedXMP", "", [name])]), packet, name


def _printable(text: str) -> str:
    """Without what XML cannot hold."""
    return "".join(c for c in text if c in "\t\n\r" or "\x20" <= c <= "\ud7ff" or "\ue000" <= c <= "\ufffd" or c > "\uffff")


def _new(document: minidom.Document, parent: minidom.Element, name: str, attributes: Mapping[str, str] | None = None):
    """A new element of RDF's namespace, under the prefix that the packet has for it."""
    rdf = document.getElementsByTagNameNS(RDF, "RDF")[0]
    prefix = rdf.prefix or "rdf"
    element = document.createElementNS(RDF, f"{prefix}:{name}")
    for key, text in (attributes or {}).items():
        element.setAttributeNS(RDF, f"{prefix}:{key}", text)
    parent.appendChild(element)
    return element


def _all(document: minidom.Document) -> list[minidom.Element]:
    return list(document.getElementsByTagName("*"))


def _has(document: minidom.Document, namespace: str, name: str) -> bool:
    return bool(document.getElementsByTagNameNS(namespace, name)) or any(
        element.hasAttributeNS(namespace, name) for element in document.getElementsByTagNameNS(RDF, "Description")
    )


def _set(document: minidom.Document, values: Mapping[tuple[str, str], str]) -> bool:
    """Give properties that are there another value; whether one changed."""
    changed = False
    for (namespace, name), text in values.items():
        for element in document.getElementsByTagNameNS(RDF, "Description"):
            if element.hasAttributeNS(namespace, name) and element.getAttributeNS(namespace, name) != text:
                element.setAttributeNS(namespace, element.getAttributeNodeNS(namespace, name).name, text)
                changed = True
        for element in document.getElementsByTagNameNS(namespace, name):
            if element.firstChild is not None and getattr(element.firstChild, "data", text) != text:
                element.firstChild.data = text
                changed = True
    return changed


def _remove(document: minidom.Document, unwanted) -> bool:
    changed = False
    for element in _all(document):
        if element.parentNode is not None and unwanted(element):
            element.parentNode.removeChild(element)
            changed = True
            continue
        for attribute in list(element.attributes.values()):
            if unwanted(attribute):
                element.removeAttributeNode(attribute)
                changed = True
    return changed


def _items(document: minidom.Document) -> list[minidom.Element]:
    """The items of a container directory: elements of any form that have a meaning."""
    found = document.getElementsByTagNameNS(CONTAINER, "Item")
    return [item for item in found if _property(item, "Semantic")]


def _property(item: minidom.Element, name: str) -> str | None:
    if item.hasAttributeNS(ITEM, name):
        return item.getAttributeNS(ITEM, name)
    for element in item.getElementsByTagNameNS(ITEM, name):
        return element.firstChild.data.strip() if element.firstChild is not None else ""
    return None


def _remove_items(document: minidom.Document, meanings: set[str]) -> bool:
    """Take items out of the directory, and the directory where nothing but the picture is left in it."""
    changed = False
    for item in _items(document):
        if _property(item, "Semantic") in meanings:
            entry = item.parentNode if item.parentNode.namespaceURI == RDF and item.parentNode.localName == "li" else item
            entry.parentNode.removeChild(entry)
            changed = True
    if changed and all(_property(item, "Semantic") == "Primary" for item in _items(document)):
        _remove(document, lambda node: node.namespaceURI == CONTAINER)
    return changed
