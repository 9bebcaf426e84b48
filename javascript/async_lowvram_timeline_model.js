/*
 * The timeline's figures: which spans lie in which lane, where they are drawn, and what they say in words.
 *
 * Pure functions of the server's JSON: times are seconds from the pass's start, a copy issued ahead may start below 0.
 */
"use strict";
window.asyncLowvram = window.asyncLowvram || {};
(function(ours) {
    ours.LANES = ["copy", "compute", "preview"];
    ours.LANE_PX = 24;
    ours.AXIS_PX = 20;
    const laneOf = {copy: "copy", compute: "compute", stall: "compute", preview: "preview"};

    /** {lanes: {copy: [...], ...}, seconds, from, to, network, age} of usable spans in order of their start; null: there is none. */
    ours.readTimeline = function(timeline) {
        if (!timeline || !timeline.network || !ours.positive(timeline.seconds) || !Array.isArray(timeline.spans)) return null;
        const lanes = Object.fromEntries(ours.LANES.map((lane) => [lane, []]));
        let from = 0, to = timeline.seconds;
        for (const span of timeline.spans) {
            if (!span || !Object.prototype.hasOwnProperty.call(laneOf, span.lane)) continue;
            if (!ours.known(span.start) || !ours.known(span.end) || span.end < span.start) continue;
            from = Math.min(from, span.start);
            to = Math.max(to, span.end);
            lanes[laneOf[span.lane]].push({...span, name: String(span.name || "")});
        }
        for (const spans of Object.values(lanes)) spans.sort((a, b) => a.start - b.start);
        return {lanes, seconds: timeline.seconds, from, to, network: String(timeline.network), age: timeline.age_seconds};
    };

    /** Where things are on a canvas `width` CSS pixels wide: x(seconds), time(x), lanes' {top, height}, height. */
    ours.timelineGeometry = function(read, width) {
        const whole = read.to - read.from;
        const lanes = Object.fromEntries(ours.LANES.map((lane, index) => [lane, {top: index * ours.LANE_PX, height: ours.LANE_PX}]));
        return {
            x: (seconds) => (seconds - read.from) / whole * width,
            time: (x) => read.from + x / width * whole,
            lanes, width, height: ours.LANES.length * ours.LANE_PX + ours.AXIS_PX,
        };
    };

    /** Share of the pass in which something of `spans` goes on; overlapping ones count once. */
    function covered(spans, seconds) {
        let until = 0, sum = 0;
        for (const span of spans) { // in order of their start
            const start = Math.max(until, span.start), end = Math.min(seconds, span.end);
            if (end > start) {
                sum += end - start;
                until = end;
            }
        }
        return sum / seconds;
    }

    /** What the picture shows, in a sentence. */
    ours.timelineSentence = function(read) {
        const {t} = ours, stalls = read.lanes.compute.filter((span) => span.lane === "stall");
        const computing = read.lanes.compute.filter((span) => span.lane === "compute");
        const parts = [t("{network}: {time}, copying {copying} of the pass, computing {computing}", {
            network: read.network, time: ours.seconds(read.seconds),
            copying: ours.percent(covered(read.lanes.copy, read.seconds)), computing: ours.percent(covered(computing, read.seconds)),
        })];
        if (stalls.length) {
            const longest = stalls.reduce((a, b) => (b.end - b.start > a.end - a.start ? b : a));
            const words = {n: stalls.length, time: ours.seconds(longest.end - longest.start), name: longest.name || ours.UNKNOWN};
            parts.push(stalls.length === 1 ? t("1 stall, {time} at {name}", words) : t("{n} stalls, longest {time} at {name}", words));
        } else {
            parts.push(t("no stalls"));
        }
        const previews = read.lanes.preview.length;
        if (previews) parts.push(previews === 1 ? t("1 preview") : t("{n} previews", {n: previews}));
        return parts.join(", ");
    };

    /** A span in words: "copy: unet.input_blocks.1 · 1.24 ms · 12.3 MB · at 3.20 ms". */
    ours.spanWords = function(span) {
        const {t} = ours;
        const lane = {copy: t("copy"), compute: t("compute"), stall: t("GPU waits"), preview: t("preview")}[span.lane];
        const words = [`${lane}: ${span.name || ours.UNKNOWN}`, ours.seconds(span.end - span.start)];
        if (ours.positive(span.bytes)) words.push(ours.bytes(span.bytes));
        words.push(t("at {time}", {time: ours.seconds(span.start)}));
        return words.join(" · ");
    };

    /** The span of `lane` at `seconds`, a stall before what it holds up; else the nearest within `reach` seconds; else null. */
    ours.spanAt = function(read, lane, seconds, reach) {
        let found = null, least = reach;
        for (const span of read.lanes[lane]) {
            const away = Math.max(span.start - seconds, seconds - span.end, 0);
            if (away < least || away === 0 && (span.lane === "stall" || least > 0)) {
                found = span;
                least = away;
                if (away === 0 && span.lane === "stall") break;
            }
        }
        return found;
    };

    /** The span that `key` leads to from `chosen` (null: none yet), or null where the key means nothing here. */
    ours.spanByKey = function(read, chosen, key) {
        const used = ours.LANES.filter((lane) => read.lanes[lane].length);
        if (!used.length || !["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End"].includes(key)) return null;
        if (!chosen) return read.lanes[used.includes("compute") ? "compute" : used[0]][0];
        const lane = laneOf[chosen.lane], spans = read.lanes[lane], at = spans.indexOf(chosen);
        const within = (index, length) => Math.max(0, Math.min(length - 1, index));
        if (key === "ArrowLeft" || key === "ArrowRight") return spans[within(at + (key === "ArrowRight" ? 1 : -1), spans.length)];
        if (key === "Home") return spans[0];
        if (key === "End") return spans[spans.length - 1];
        const other = read.lanes[used[within(used.indexOf(lane) + (key === "ArrowDown" ? 1 : -1), used.length)]];
        const away = (span) => Math.abs(span.start - chosen.start);
        return other === spans ? chosen : other.reduce((a, b) => (away(b) < away(a) ? b : a));
    };
})(window.asyncLowvram);
