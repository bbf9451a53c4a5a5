// The byte-level BPE of data.py in JavaScript: the same ids for the same text.

// data.PATTERN, and below it the same pieces in the classes of a JavaScript expression.
export const PATTERN = ' ?[^\\W\\d]+| ?\\d| ?[^\\s\\w]+|\\s';
const LETTER = '\\p{Alphabetic}\\p{M}\\p{Pc}\\p{Join_Control}';
const PIECES = new RegExp(` ?[${LETTER}]+| ?\\p{Nd}| ?[^\\s${LETTER}\\p{Nd}]+|\\s`, 'gu');

export const PAD = 0;
export const BOS = 1;
export const EOS = 2;
export const PARA = 3;

// grammar.normalize: lower case, no punctuation, single spaces, "an" as "a"; marks stay with their letters.
export function normalize(text) {
  const words = text.toLowerCase().split(/[^\p{L}\p{N}\p{M}]+/u).filter((word) => /[\p{L}\p{N}]/u.test(word));
  return words.map((word) => (word === 'an' ? 'a' : word)).join(' ');
}

// Takes { pattern, specials, ranks } of model.json; ranks are base64 of the bytes of each token, in rank order. Bytes
// are held as strings of characters 0 to 255, which can be joined and looked up.
export class Tokenizer {
  constructor({ pattern, specials, ranks }) {
    if (pattern !== PATTERN) throw new Error('the tokenizer splits words by another pattern than tokenizer.js');
    this.specials = specials;
    this.bytes = ranks.map(atob);
    this.rank = new Map(this.bytes.map((token, rank) => [token, rank]));
  }

  // Ids of the normalised text, closed by EOS; what is longer than maxLength is cut, as sample.py does.
  encode(text, maxLength) {
    const ids = [];
    for (const [piece] of ` ${normalize(text)}`.matchAll(PIECES)) {
      const bytes = String.fromCharCode(...new TextEncoder().encode(piece));
      for (const part of this.merge(bytes)) ids.push(this.rank.get(part) + this.specials);
    }
    return [...(ids.length < maxLength ? ids : ids.slice(0, maxLength - 1)), EOS];
  }

  // The pair of lowest rank is joined, the first of equals, until no pair is a token.
  merge(bytes) {
    const parts = [...bytes];
    for (;;) {
      let [best, at] = [Infinity, -1];
      for (let i = 0; i + 1 < parts.length; i++) {
        const rank = this.rank.get(parts[i] + parts[i + 1]) ?? Infinity;
        if (rank < best) [best, at] = [rank, i];
      }
      if (at < 0) return parts;
      parts.splice(at, 2, parts[at] + parts[at + 1]);
    }
  }

  // Words of a sentence of ids up to EOS: [{ word, ids: [positions] }]; a word is one or more tokens.
  words(ids) {
    const words = [];
    let current = null;
    for (let i = 0; i < ids.length && ids[i] !== EOS && ids[i] !== PAD; i++) {
      const bytes = this.bytes[ids[i] - this.specials] ?? '';
      if (!current || bytes.startsWith(' ')) words.push(current = { bytes: '', ids: [] });
      current.bytes += bytes;
      current.ids.push(i);
    }
    const text = (bytes) => new TextDecoder().decode(Uint8Array.from(bytes, (c) => c.charCodeAt(0))).trim();
    return words.map(({ bytes, ids: positions }) => ({ word: text(bytes), ids: positions }));
  }

  decode(ids) {
    return this.words(ids).map(({ word }) => word).join(' ');
  }
}
