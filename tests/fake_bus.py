"""Six STS3215 servos on a pseudo terminal, for LeRobot's driver to talk to: what it reads, writes, and what goes wrong.

A packet is FF FF, id, length, instruction or status, parameters, and the complement of their sum. Servo k has id k + 1;
its goal becomes its position at once, unless it is `stalled`.
"""

import os
import pty
import random
import threading
import tty

PING, READ, WRITE, SYNC_READ, SYNC_WRITE = 0x01, 0x02, 0x03, 0x82, 0x83
EVERYBODY = 0xFE
MODEL, ID, LOWEST, HIGHEST, TORQUE, GOAL, POSITION, TEMPERATURE = 3, 5, 9, 11, 40, 42, 56, 63
OVERLOAD = 0x20  # of the status byte


class FakeBus:
    """Args: `ranges`, of each servo the lowest and the highest position that it takes, in ticks.

    `port` is where it is plugged in. `lost` is the share of replies that do not arrive; `status[id]` what servo `id`
    reports with each reply; `sent` every goal that came, {id: ticks}; `stalled` the ids that do not move.
    """

    def __init__(self, ranges):
        self.memory = {id_: bytearray(128) for id_ in range(1, len(ranges) + 1)}
        self.status = dict.fromkeys(self.memory, 0)
        self.lost, self.sent, self.stalled, self.random = 0.0, [], set(), random.Random(0)
        for (id_, memory), (low, high) in zip(self.memory.items(), ranges, strict=True):
            memory[0:2], memory[ID], memory[TEMPERATURE] = bytes([3, 10]), id_, 30  # firmware, id, degrees Celsius
            for address, value in ((MODEL, 777), (LOWEST, low), (HIGHEST, high)):
                self.put(id_, address, value)
            self.put(id_, GOAL, (low + high) // 2)
            self.put(id_, POSITION, (low + high) // 2)
        self.ours, self.theirs = pty.openpty()
        for end in (self.ours, self.theirs):
            tty.setraw(end)
        self.port, self.plugged = os.ttyname(self.theirs), True
        threading.Thread(target=self.serve, daemon=True).start()

    def put(self, id_, address, value):
        self.memory[id_][address : address + 2] = value.to_bytes(2, "little")

    def get(self, id_, address):
        return int.from_bytes(self.memory[id_][address : address + 2], "little")

    def torques(self):
        return [memory[TORQUE] for memory in self.memory.values()]

    def unplug(self):
        if self.plugged:
            self.plugged = False
            os.close(self.theirs)
            os.close(self.ours)

    def serve(self):
        try:
            while True:
                while self.take(1) != b"\xff" or self.take(1) != b"\xff":
                    pass
                id_, length = self.take(2)
                instruction, *parameters, _ = self.take(length)
                self.obey(id_, instruction, bytes(parameters))
        except OSError:  # unplugged
            return

    def take(self, count):
        taken = b""
        while len(taken) < count:
            taken += os.read(self.ours, count - len(taken))
        return taken

    def obey(self, id_, instruction, parameters):
        if instruction == SYNC_READ:
            address, size, *ids = parameters
            for each in ids:
                self.reply(each, self.memory[each][address : address + size])
        elif instruction == SYNC_WRITE:
            address, size, *rest = parameters
            for k in range(0, len(rest), size + 1):
                self.store(rest[k], address, bytes(rest[k + 1 : k + 1 + size]))
            if address == GOAL:
                self.sent.append({each: self.get(each, GOAL) for each in rest[:: size + 1]})
        elif instruction == PING:
            for each in self.memory if id_ == EVERYBODY else [id_]:
                self.reply(each)
        elif instruction == READ:
            address, size = parameters
            self.reply(id_, self.memory[id_][address : address + size])
        elif instruction == WRITE:
            self.store(id_, parameters[0], parameters[1:])
            self.reply(id_)

    def store(self, id_, address, values):
        self.memory[id_][address : address + len(values)] = values
        if address == GOAL and id_ not in self.stalled:
            self.put(id_, POSITION, self.get(id_, GOAL))

    def reply(self, id_, values=b""):
        if self.random.random() < self.lost:
            return
        packet = bytes([id_, len(values) + 2, self.status[id_], *values])
        os.write(self.ours, b"\xff\xff" + packet + bytes([~sum(packet) & 0xFF]))
