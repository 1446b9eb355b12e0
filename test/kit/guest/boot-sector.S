# Boot sector that SeaBIOS loads from the first disk under test: reads, checks, counts up and writes again, for ever, on
# all disks in turn.
#
# The blocks 16 to 31 of each disk hold one 32-bit counter, repeated. Each round reads them (all copies must be equal),
# writes the next number over them, reads that back and compares. Debug console (port 0xe9): 'b' at the start, '.' for
# each good round on all disks, 'r' / 'w' / 'c' when a read or write failed or what was read is wrong; then it stops.

.code16
.equ BUFFER, 0x8000
.equ BLOCKS, 16
.equ WORDS, BLOCKS * 512 / 4
.equ FIRST_DRIVE, 0x80
# BIOS data area: how many hard disks there are.
.equ DRIVE_COUNT, 0x475

.globl _start
_start:
    cli
    cld
    xor %ax, %ax
    mov %ax, %ds
    mov %ax, %es
    mov %ax, %ss
    mov $0x7c00, %sp
    mov $'b', %al
    out %al, $0xe9
round:
    movb $FIRST_DRIVE, drive
disk:
    call read
    call check
    mov BUFFER, %eax
    inc %eax
    push %eax
    call fill
    mov $0x43, %ah
    mov $'w', %bl
    call transfer
    mov $0xdeadbeef, %eax
    call fill
    call read
    call check
    pop %eax
    cmp %eax, BUFFER
    mov $'c', %bl
    jne fail
    incb drive
    mov DRIVE_COUNT, %al
    add $FIRST_DRIVE, %al
    cmp %al, drive
    jne disk
    mov $'.', %al
    out %al, $0xe9
    jmp round

# All copies in the buffer are equal, or the program ends.
check:
    mov $BUFFER, %di
    mov (%di), %eax
    mov $WORDS, %cx
    repe scasl
    mov $'c', %bl
    jne fail
    ret

# EAX into the whole buffer.
fill:
    mov $BUFFER, %di
    mov $WORDS, %cx
    rep stosl
    ret

read:
    mov $0x42, %ah
    mov $'r', %bl
# INT 13h, AH = 42h (read) or 43h (write) with the packet below; BL says what went wrong.
transfer:
    push %bx
    xor %al, %al
    mov drive, %dl
    mov $packet, %si
    movw $BLOCKS, packet + 2
    int $0x13
    pop %bx
    jc fail
    ret

fail:
    mov %bl, %al
    out %al, $0xe9
1:  hlt
    jmp 1b

drive:
    .byte 0
    .balign 4
packet:
    .byte 16, 0
    .word BLOCKS
    .word BUFFER, 0
    .quad 16

.org 510
    .word 0xaa55
